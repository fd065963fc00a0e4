"""Follow a training job with the SDK's own log reader; then how it ended, and what it cost.

    python -m launch.sagemaker.follow JOB_NAME

Interrupting this stops nothing: the job goes on.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from configs.loader import load_config
from launch.sagemaker.account import Account, check_sdk
from launch.sagemaker.failures import is_gone, one_sentence_errors


@dataclass(frozen=True, kw_only=True)
class Command:
    """A training job to follow."""

    job: str = ""
    """Its name."""
    region: str | None = None
    """Left out, AWS_REGION, AWS_DEFAULT_REGION, or the AWS profile's."""


def follow(name: str, account: Account | None = None) -> dict[str, Any]:
    """Print the log lines of all hosts until the job ends; returns what DescribeTrainingJob then says.

    Raises ValueError where there is no such job, RuntimeError with SageMaker's reason where the job failed.
    """
    session = (account or Account()).find_session()
    client = session.client("sagemaker")
    check_sdk()
    from sagemaker.core import resources
    from sagemaker.core.utils.exceptions import FailedStatusError

    try:
        client.describe_training_job(TrainingJobName=name)
    except client.exceptions.ClientError as error:
        if not is_gone(error):
            raise
        raise ValueError(f"there is no training job {name} in {session.region_name}.") from None
    log, shown = logging.getLogger(resources.__name__), logging.StreamHandler(sys.stdout)
    log.addHandler(shown)  # the SDK logs the lines, and leaves it to its caller to show them
    log.setLevel(logging.INFO)
    try:
        found = resources.TrainingJob.get(training_job_name=name, session=session, region=session.region_name)
        found.wait(logs=True)
    except FailedStatusError:
        pass  # raised below
    finally:
        log.removeHandler(shown)
    job = client.describe_training_job(TrainingJobName=name)
    print("\n".join(summary(job)), flush=True)
    if job["TrainingJobStatus"] == "Failed":
        raise RuntimeError(f"job {name} failed: {job.get('FailureReason', 'no reason is given; see its logs')}")
    return job


def summary(job: dict[str, Any]) -> list[str]:
    """Status, last values of the metrics, seconds that are paid for, and where the model is."""
    lines = [f"-- {job['TrainingJobName']}: {job['TrainingJobStatus']}"]
    for metric in sorted(job.get("FinalMetricDataList", []), key=lambda metric: metric["MetricName"]):
        lines.append(f"{metric['MetricName']} {metric['Value']:.6g}")
    if "BillableTimeInSeconds" in job:
        machines = job.get("ResourceConfig", {}).get("InstanceCount", 1)
        billed, total = job["BillableTimeInSeconds"], job.get("TrainingTimeInSeconds", 0)
        saved = f", {1 - billed / total:.0%} saved by spot" if total > billed else ""
        lines.append(f"billed: {billed} s on each of {machines} machine(s){saved}")
    if job.get("ModelArtifacts", {}).get("S3ModelArtifacts"):
        lines.append(f"model: {job['ModelArtifacts']['S3ModelArtifacts'].rstrip('/')}/")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    command: Command = load_config(Command, words, prog="follow", positional=("job",))
    with one_sentence_errors("follow"):
        try:
            follow(command.job, Account(region=command.region))
        except KeyboardInterrupt:
            print(f"follow: {command.job} goes on", file=sys.stderr)


if __name__ == "__main__":
    main()
