"""What the API takes but must not be sent: secrets in clear text, and what would end the paid job at its start.

The SDK's own scripts write hyperparameters into a shell file between single quotes (a quote inside ends the job without
a message) and make each name a shell variable (so does a dot in a name).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any

SECRET_NAMES = re.compile(r"(^|_)(API_KEY|ACCESS_KEY|SECRET|TOKEN|PASSWORD)$")
SECRETS_HERE = (
    *("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY"),
    "AWS_SESSION_TOKEN",
)
"""Variables of this machine whose values must not stand in a request."""


def encode_hyperparameters(hyperparameters: Mapping[str, Any]) -> dict[str, str]:
    """Text as it is, everything else as JSON: what the job finds in hyperparameters.json.

    Raises ValueError for names and values that end the job at its start.
    """
    encoded = {}
    for key, value in hyperparameters.items():
        if "." in key:
            raise ValueError(
                f"hyperparameter `{key}`: a dot ends the job at its start; write `{key.rpartition('.')[2]}`, without "
                "the section."
            )
        encoded[key] = value if isinstance(value, str) else json.dumps(value)
        if "'" in encoded[key]:
            raise ValueError(
                f"hyperparameter `{key}`: a single quote in a value ends the job at its start; put the key in the YAML."
            )
    return encoded


def check_channel(name: str) -> None:
    """Raises ValueError for a channel name that cannot be part of a shell variable's name."""
    if not re.fullmatch(r"\w+", name, re.ASCII):
        raise ValueError(
            f"channel `{name}`: use letters, digits and `_` only; a dash or dot ends the job at its start."
        )


def check_environment(environment: Mapping[str, str]) -> None:
    """Raises ValueError for a variable that is named like a secret."""
    for name in environment:
        if SECRET_NAMES.search(name):
            raise ValueError(
                f"environment `{name}` would stand in clear text in the request: put the value in AWS Secrets Manager "
                "and give the secret's name (wandb_secret, hf_secret)."
            )


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


def split_s3(uri: str, what: str) -> tuple[str, str]:
    """Bucket and prefix (without slashes around it) of an `s3://` address."""
    match = re.fullmatch(r"s3://([a-z0-9][a-z0-9.-]+)(?:/(.*))?", uri)
    if not match:
        raise ValueError(f"{what} `{uri}` is no S3 address: write s3://BUCKET/PREFIX.")
    return match[1], (match[2] or "").strip("/")
