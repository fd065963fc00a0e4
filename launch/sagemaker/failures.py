"""What AWS or the network says, as one sentence; and what of it passes by itself."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

Answer = TypeVar("Answer")
NO_SDK = "the SageMaker SDK is not installed: pip install -e '.[sagemaker]'"
BUSY = re.compile("Throttl|TooManyRequests|RequestLimitExceeded|SlowDown|ServiceUnavailable|InternalFailure")
GONE = re.compile("NotFound|NoSuch|ResourceNotFound|^404$|could not find|not found|does not exist", re.IGNORECASE)
HINTS = {"ExpiredToken": "renew the credentials", "Credential": "see `aws configure`", "NoRegion": "give --region"}


def aws_errors() -> tuple[type[Exception], ...]:
    """Everything that boto3 raises; empty where it is not installed."""
    try:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:
        return ()
    return Boto3Error, BotoCoreError, ClientError


def sentence_of(error: BaseException) -> str:
    """The error's own words in one line, with what to do about it where that is known."""
    code = f"{type(error).__name__} {_code(error)}"
    hints = [hint for word, hint in HINTS.items() if word in code]
    return "; ".join([" ".join(str(error).split()), *hints[:1]])


def is_gone(error: BaseException) -> bool:
    """Whether AWS says that what was asked for does not exist."""
    return bool(GONE.search(_code(error)) or GONE.search(str(error)))


def find_region(region: str | None, session: Any = None) -> str:
    """`region`, else the session's, AWS_REGION, AWS_DEFAULT_REGION, or the AWS profile's."""
    import boto3

    region = region or (session and session.region_name) or os.environ.get("AWS_REGION")
    region = region or os.environ.get("AWS_DEFAULT_REGION") or boto3.Session().region_name
    if not region:
        raise ValueError("no region: give --region, or set AWS_DEFAULT_REGION.")
    return region


@contextmanager
def one_sentence_errors(command: str) -> Iterator[None]:
    """End a command with one sentence: exit code 2 for what the user can correct, 1 for what AWS or the job says."""
    try:
        yield
    except (ValueError, RuntimeError, ImportError, OSError, *aws_errors()) as error:
        if isinstance(error, ImportError) and (error.name or "").partition(".")[0] not in ("boto3", "sagemaker"):
            raise
        said = f"AWS: {sentence_of(error)}" if isinstance(error, aws_errors()) else str(error)
        print(f"{command}: {NO_SDK + '.' if isinstance(error, ImportError) else said}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, ValueError | ImportError | OSError) else 1) from None


class Patience:
    """Ask AWS again where it is busy or the network is away: for ever, once it has answered."""

    def __init__(self, poll_seconds: float, say: Callable[[str], object]) -> None:
        self.poll_seconds, self.say = poll_seconds, say
        self.answered = False

    def __call__(self, ask: Callable[[], Answer]) -> Answer:
        tries = 0
        while True:
            try:
                answer, self.answered = ask(), True
                return answer
            except aws_errors() as error:
                tries += 1
                if not _passes(error) or (tries > 2 and not self.answered):
                    raise
                if tries == 1:
                    self.say(f"{sentence_of(error)}: asking again")
                time.sleep(self.poll_seconds)


def _code(error: BaseException) -> str:
    return str(getattr(error, "response", {}).get("Error", {}).get("Code", ""))


def _passes(error: BaseException) -> bool:
    from botocore.exceptions import ConnectionError, HTTPClientError

    status = getattr(error, "response", {}).get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return isinstance(error, ConnectionError | HTTPClientError) or bool(BUSY.search(_code(error))) or status >= 500
