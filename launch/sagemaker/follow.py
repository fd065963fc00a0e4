"""Follow a training job: its logs as they come, metrics among them, and how it ended.

    python -m launch.sagemaker.follow JOB_NAME

Interrupting this stops nothing: the job goes on.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from typing import Any

from launch.sagemaker.failures import Patience, aws_errors, find_region, is_gone, one_sentence_errors

LOG_GROUP = "/aws/sagemaker/TrainingJobs"
LATE_SECONDS = 120  # CloudWatch may show a line so much later than a newer one


def follow(name: str, *, session: Any = None, poll_seconds: float = 10.0, out: Any = None) -> dict[str, Any]:
    """Print the log lines of all hosts until the job ends; returns what DescribeTrainingJob then says.

    A busy AWS or a network that is away for a while is waited for. Raises ValueError where there is no such job,
    RuntimeError with SageMaker's reason where the job failed.
    """
    if session is None:
        import boto3

        session = boto3.Session()
    client, logs = session.client("sagemaker"), session.client("logs")
    out = out or sys.stdout
    ask = Patience(poll_seconds, lambda text: print(f"-- {text}", file=out, flush=True))
    seen: set[str] = set()
    start, status = 0, ""
    while True:
        try:
            job = ask(partial(client.describe_training_job, TrainingJobName=name))
        except aws_errors() as error:
            if not is_gone(error):
                raise
            raise ValueError(f"there is no training job {name} in {client.meta.region_name}.") from None
        ended = job["TrainingJobStatus"] in ("Completed", "Failed", "Stopped")
        if job.get("SecondaryStatus", "") != status:
            status = job.get("SecondaryStatus", "")
            print(f"-- {status}", file=out, flush=True)
        several = job.get("ResourceConfig", {}).get("InstanceCount", 1) > 1
        start = ask(partial(_print_new_lines, logs, name, seen, start, several, out))
        if ended:
            break
        time.sleep(poll_seconds)
    for line in summary(job):
        print(line, file=out, flush=True)
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
        billed, whole = job["BillableTimeInSeconds"], job.get("TrainingTimeInSeconds", 0)
        saved = f", {1 - billed / whole:.0%} saved by spot" if whole > billed else ""
        lines.append(f"billed: {billed} s on each of {machines} machine(s){saved}")
    if job.get("ModelArtifacts", {}).get("S3ModelArtifacts"):
        lines.append(f"model: {job['ModelArtifacts']['S3ModelArtifacts'].rstrip('/')}/")
    return lines


def _print_new_lines(logs: Any, name: str, seen: set[str], start: int, several: bool, out: Any) -> int:
    """Print events that were not there before; returns from when (milliseconds) to ask next."""
    request = {"logGroupName": LOG_GROUP, "logStreamNamePrefix": f"{name}/", "startTime": start}
    newest = start
    try:
        for page in logs.get_paginator("filter_log_events").paginate(**request):
            for event in page["events"]:
                if event["eventId"] in seen:
                    continue
                seen.add(event["eventId"])
                newest = max(newest, event["timestamp"] - 1000 * LATE_SECONDS)
                host = event["logStreamName"].rpartition("/")[2].rpartition("-")[0]  # algo-1-1700000000
                print(f"[{host}] {event['message']}" if several else event["message"], file=out, flush=True)
    except logs.exceptions.ResourceNotFoundException:
        return start  # the job has not begun to write
    return newest


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m launch.sagemaker.follow", description=__doc__)
    parser.add_argument("job", help="name of a training job")
    parser.add_argument("--region", help="default: AWS's own settings")
    options = parser.parse_args()
    with one_sentence_errors("follow"):
        import boto3

        try:
            follow(options.job, session=boto3.Session(region_name=find_region(options.region)))
        except KeyboardInterrupt:
            print(f"follow: {options.job} goes on", file=sys.stderr)


if __name__ == "__main__":
    main()
