"""What CreateTrainingJob refuses, and what it takes but the job dies of: one sentence each, before anything is sent.

The second kind was found by running the SDK's own scripts: they write hyperparameters into a shell file between single
quotes (a quote inside ends the job without a message) and make each name a shell variable (so does a dot in a name).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any

RESERVED_CHANNELS = ("code", "sm_drivers", "recipe")  # the SDK's own
MAX_CHANNELS = 18  # 20, two of which the SDK takes
SECRET_NAMES = re.compile(r"(^|_)(API_KEY|ACCESS_KEY|SECRET|TOKEN|PASSWORD)$")
SECRETS_HERE = (
    *("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY"),
    "AWS_SESSION_TOKEN",
)
"""Variables of this machine whose values must not stand in a request."""


def encode_hyperparameters(hyperparameters: Mapping[str, Any]) -> dict[str, str]:
    """Text as it is, everything else as JSON: what the job finds in hyperparameters.json.

    Raises ValueError for names and values that CreateTrainingJob refuses or that end the job at its start.
    """
    if len(hyperparameters) > 100:
        raise ValueError(
            f"{len(hyperparameters)} hyperparameters are given and SageMaker takes 100: put them in the YAML."
        )
    encoded = {}
    for key, value in hyperparameters.items():
        if "." in key:
            raise ValueError(
                f"hyperparameter `{key}`: a dot ends the job at its start; write `{key.rpartition('.')[2]}`, without "
                "the section."
            )
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]{0,255}", key):
            raise ValueError(f"hyperparameter `{key}`: use letters, digits, `_` and `-` only, 256 at most.")
        text = value if isinstance(value, str) else json.dumps(value)
        if "'" in text:
            raise ValueError(
                f"hyperparameter `{key}`: a single quote in a value ends the job at its start; put the key in the YAML."
            )
        if len(text) > 2500:
            raise ValueError(
                f"hyperparameter `{key}` has {len(text)} characters and SageMaker takes 2500: put it in the YAML."
            )
        encoded[key] = text
    return encoded


def check_environment(environment: Mapping[str, str]) -> None:
    """Raises ValueError for names, sizes and counts that SageMaker refuses, and for what is named like a secret."""
    if len(environment) > 100:
        raise ValueError(f"{len(environment)} environment variables are given and SageMaker takes 100: drop some.")
    for name, value in environment.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,511}", name):
            raise ValueError(f"environment `{name}`: use letters, digits and `_` only, no digit first.")
        if SECRET_NAMES.search(name):
            raise ValueError(
                f"environment `{name}` would stand in clear text in the request: put the value in AWS Secrets Manager "
                "and give the secret's name (wandb_secret, hf_secret)."
            )
        if len(value) > 512:
            raise ValueError(f"environment `{name}` has {len(value)} characters and SageMaker takes 512: shorten it.")


def check_channel(name: str) -> None:
    """Raises ValueError for a channel name that is reserved, or that is no part of a shell variable's name."""
    if name in RESERVED_CHANNELS:
        raise ValueError(f"channel `{name}` is the SDK's own: take another name.")
    if not re.fullmatch(r"[A-Za-z0-9_]{1,64}", name):
        raise ValueError(
            f"channel `{name}`: use letters, digits and `_` only, 64 at most; a dash or dot ends the job at its start."
        )


def check_tags(tags: Mapping[str, str]) -> None:
    if len(tags) > 50:
        raise ValueError(f"{len(tags)} tags are given and AWS takes 50: drop some.")
    for key, value in tags.items():
        if not 1 <= len(key) <= 128 or len(value) > 256 or key.startswith("aws:"):
            raise ValueError(f"tag `{key}`: a key has 1 to 128 characters, not `aws:` first, and a value at most 256.")


def check_name(name: str, what: str, longest: int) -> None:
    """Names of jobs, endpoints and models: letters, digits and single dashes inside."""
    if not re.fullmatch(r"[A-Za-z0-9](-?[A-Za-z0-9])*", name) or len(name) > longest:
        raise ValueError(f"{what} `{name}`: use letters, digits and `-` inside, {longest} at most.")


def check_role(role: str | None, dry_run: bool) -> str:
    """The role's ARN; a dry run, which has no need of one, shows where it would stand."""
    role = role or os.environ.get("SAGEMAKER_ROLE_ARN") or ("arn:aws:iam::000000000000:role/ROLE" if dry_run else None)
    if not role:
        raise ValueError("no role: give --role, or set SAGEMAKER_ROLE_ARN (docs/sagemaker.md has its policy).")
    if not re.fullmatch(r"arn:aws[a-z-]*:iam::\d{12}:role/[\w+=,.@/-]+", role):
        raise ValueError(f"role `{role}` is no ARN of a role: write arn:aws:iam::ACCOUNT:role/NAME.")
    return role


def check_s3(uri: str, what: str) -> tuple[str, str]:
    """Bucket and prefix (without slashes around it) of an `s3://` address."""
    match = re.fullmatch(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/(.*))?", uri)
    if not match:
        raise ValueError(f"{what} `{uri}` is no S3 address: write s3://BUCKET/PREFIX.")
    return match[1], (match[2] or "").strip("/")


def check_addresses(values: Mapping[str, Any]) -> None:
    """Raises ValueError for an address with a password in it: requests and config files are no secrets."""
    for key, value in values.items():
        if re.search(r"://[^/\s:@]*:[^/\s]*@", str(value)):
            raise ValueError(
                f"{key} holds a password, which would stand in clear text in the request: leave it out, and set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in your own image, or give SageMaker's MLflow."
            )


def check_no_secrets(request: Any) -> None:
    """Raises ValueError where a secret of this machine's environment stands in the request."""
    text = json.dumps(request, default=str)
    for name in SECRETS_HERE:
        value = os.environ.get(name, "")
        if len(value) >= 8 and value in text:
            raise ValueError(f"the value of {name} would stand in clear text in the request: give it by secret name.")
