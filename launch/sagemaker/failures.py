"""What AWS or the network says, as one sentence."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

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


@contextmanager
def one_sentence_errors(command: str) -> Iterator[None]:
    """End a command with one sentence: exit code 2 for what the user can correct, 1 for what AWS or the job says."""
    try:
        yield
    except (ValueError, RuntimeError, OSError, *aws_errors()) as error:
        said = f"AWS: {sentence_of(error)}" if isinstance(error, aws_errors()) else str(error)
        print(f"{command}: {said}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, ValueError | OSError) else 1) from None


def _code(error: BaseException) -> str:
    return str(getattr(error, "response", {}).get("Error", {}).get("Code", ""))
