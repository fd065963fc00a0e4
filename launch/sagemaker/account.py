"""The AWS account that a command works in: its role, region and session."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

NO_SDK = "the SageMaker SDK is not installed: pip install -e '.[sagemaker]'."


@dataclass(frozen=True)
class Account:
    """What is left out comes from the environment or the AWS profile."""

    role: str | None = None
    """ARN of the execution role; left out, SAGEMAKER_ROLE_ARN."""
    region: str | None = None
    """Left out, the session's, AWS_REGION, AWS_DEFAULT_REGION, or the AWS profile's."""
    session: Any = None
    """boto3 session; left out, this machine's credentials."""

    def find_role(self, dry_run: bool) -> str:
        """The role's ARN; a dry run, which needs none, shows a placeholder."""
        role = self.role or os.environ.get("SAGEMAKER_ROLE_ARN")
        role = role or ("arn:aws:iam::000000000000:role/ROLE" if dry_run else None)
        if not role:
            raise ValueError("no role: give --role, or set SAGEMAKER_ROLE_ARN (docs/sagemaker.md has its policy).")
        if not re.fullmatch(r"arn:aws[a-z-]*:iam::\d{12}:role/\S+", role):
            raise ValueError(f"role `{role}` is no ARN of a role: write arn:aws:iam::ACCOUNT:role/NAME.")
        return role

    def find_session(self) -> Any:
        """A boto3 session with a region."""
        try:
            import boto3
        except ImportError:
            raise ValueError(NO_SDK) from None
        if self.session is not None:
            return self.session
        region = self.region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        session = boto3.Session(region_name=region)
        if not session.region_name:
            raise ValueError("no region: give --region, or set AWS_DEFAULT_REGION.")
        return session


def check_sdk() -> None:
    """Raises ValueError where the SageMaker SDK is not installed."""
    try:
        import sagemaker.train  # noqa: F401
    except ImportError:
        raise ValueError(NO_SDK) from None
