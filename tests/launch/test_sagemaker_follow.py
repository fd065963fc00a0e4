"""Following a job: each line once, in time, from every host; and how it ended."""

import importlib.util
import io

import pytest

from launch.sagemaker.follow import follow, summary


class NotThere(Exception):
    pass


class Aws:
    """Job and logs, as two polls and a last one find them: `states` and what is in the log by then."""

    def __init__(self, states, logs, hosts=1):
        self.states, self.logs, self.hosts = states, logs, hosts
        self.polls = 0
        self.exceptions = type("Exceptions", (), {"ResourceNotFoundException": NotThere})

    def client(self, name):
        return self

    def describe_training_job(self, TrainingJobName):
        state = {"TrainingJobStatus": "InProgress", **self.states[self.polls]}
        return {"TrainingJobName": TrainingJobName, "ResourceConfig": {"InstanceCount": self.hosts}, **state}

    def get_paginator(self, name):
        return self

    def paginate(self, logGroupName, logStreamNamePrefix, startTime):
        assert (logGroupName, logStreamNamePrefix) == ("/aws/sagemaker/TrainingJobs", "job-1/")
        lines = self.logs[self.polls]
        self.polls += 1
        if lines is None:
            raise NotThere
        keep = [line for line in lines if line[1] >= startTime]
        return [{"events": [event(*line)]} for line in keep]


def event(host, milliseconds, text):
    name = f"job-1/algo-{host}-1700000000"
    return {"eventId": f"{name}{milliseconds}", "logStreamName": name, "timestamp": milliseconds, "message": text}


STATES = [{"SecondaryStatus": "Pending"}, {"SecondaryStatus": "Training"}]
DONE = {"TrainingJobStatus": "Completed", "SecondaryStatus": "Completed"}


def test_every_line_is_shown_once_also_one_that_comes_late():
    """Three polls: no log yet; two lines; a third that is older than the second, and a fourth."""
    first, second = (1, 1_000_000, "step 1/2 loss/nll=2.5"), (1, 1_060_000, "step 2/2 loss/nll=1.5")
    late, last = (1, 1_030_000, "late"), (1, 1_070_000, "model written")
    logs = [None, [first, second], [first, late, second, last]]
    out = io.StringIO()
    job = follow("job-1", session=Aws([*STATES, DONE], logs), poll_seconds=0, out=out)
    assert job["TrainingJobStatus"] == "Completed"
    lines = ["-- Pending", "-- Training", first[2], second[2], "-- Completed", late[2], last[2], "-- job-1: Completed"]
    assert out.getvalue().splitlines() == lines


def test_lines_of_several_hosts_say_whose_they_are():
    out = io.StringIO()
    logs = [[(1, 1, "hello"), (2, 2, "hello")]]
    follow("job-1", session=Aws([DONE], logs, hosts=2), poll_seconds=0, out=out)
    assert "[algo-1] hello\n[algo-2] hello\n" in out.getvalue()


def test_a_failed_job_ends_with_sagemakers_reason():
    failed = {"TrainingJobStatus": "Failed", "SecondaryStatus": "Failed", "FailureReason": "AlgorithmError: rank 3"}
    with pytest.raises(RuntimeError, match="job job-1 failed: AlgorithmError: rank 3"):
        follow("job-1", session=Aws([failed], [None]), poll_seconds=0, out=io.StringIO())


def test_the_summary_has_metrics_what_is_paid_and_where_the_model_is():
    """Spot: 30 of 100 seconds are paid, on each of two machines."""
    job = {
        "TrainingJobName": "job-1",
        "TrainingJobStatus": "Completed",
        "FinalMetricDataList": [
            {"MetricName": "loss/nll", "Value": 0.5},
            {"MetricName": "eval/accuracy", "Value": 0.75},
        ],
        "BillableTimeInSeconds": 30,
        "TrainingTimeInSeconds": 100,
        "ResourceConfig": {"InstanceCount": 2},
        "ModelArtifacts": {"S3ModelArtifacts": "s3://mine/output/job-1/output/model"},
    }
    assert summary(job) == [
        "-- job-1: Completed",
        "eval/accuracy 0.75",
        "loss/nll 0.5",
        "billed: 30 s on each of 2 machine(s), 70% saved by spot",
        "model: s3://mine/output/job-1/output/model/",
    ]


@pytest.mark.skipif(importlib.util.find_spec("botocore") is None, reason="needs boto3: pip install -e '.[sagemaker]'")
def test_a_busy_aws_or_a_lost_network_does_not_end_it():
    """Every call fails once: throttled, or not connected. What else AWS says ends it."""
    from botocore.exceptions import ClientError, EndpointConnectionError

    class Busy(Aws):
        failures = [
            ClientError({"Error": {"Code": "ThrottlingException", "Message": "Rate exceeded"}}, "DescribeTrainingJob"),
            EndpointConnectionError(endpoint_url="https://logs"),
        ] * 2

        def describe_training_job(self, TrainingJobName):
            if len(self.failures) % 2 == 0 and self.failures:
                raise self.failures.pop(0)
            return super().describe_training_job(TrainingJobName)

        def paginate(self, **request):
            if self.failures:
                raise self.failures.pop(0)
            return super().paginate(**request)

    out = io.StringIO()
    job = follow("job-1", session=Busy([STATES[0], DONE], [[], [(1, 1, "hello")]]), poll_seconds=0, out=out)
    assert job["TrainingJobStatus"] == "Completed"
    said = out.getvalue().splitlines()
    assert [line for line in said if "asking again" not in line] == [
        "-- Pending", "-- Completed", "hello", "-- job-1: Completed"
    ]  # fmt: skip
    assert sum("asking again" in line for line in said) == 2  # once for calls that fail in a row
    Busy.failures = [ClientError({"Error": {"Code": "AccessDeniedException", "Message": "no"}}, "Describe")] * 2
    with pytest.raises(ClientError, match="no"):
        follow("job-1", session=Busy([DONE], [None]), poll_seconds=0, out=out)
