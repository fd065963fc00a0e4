"""Following a job: its log by the SDK, then how it ended."""

import importlib.util
import time

import pytest

from launch.sagemaker.account import Account
from launch.sagemaker.follow import follow, summary
from launch.sagemaker.submit import submit

MOTO = pytest.mark.skipif(
    importlib.util.find_spec("sagemaker") is None or importlib.util.find_spec("moto") is None,
    reason="needs the SageMaker SDK and moto[s3,sts,iam,sagemaker]",
)
ROLE = "arn:aws:iam::123456789012:role/local"


@MOTO
def test_a_job_is_followed_to_its_end_and_a_failed_one_gives_sagemakers_reason(capsys):
    """moto has finished jobs at once."""
    from tests.launch.local_job import pretended_aws

    with pretended_aws() as session:
        account = Account(ROLE, session=session)
        job = submit("configs/grpo.yaml", account=account)
        group, stream = "/aws/sagemaker/TrainingJobs", f"{job.name}/algo-1-1700000000"
        logs = session.client("logs")
        logs.create_log_group(logGroupName=group)
        logs.create_log_stream(logGroupName=group, logStreamName=stream)
        line = {"timestamp": int(time.time() * 1000), "message": "step 1/2 loss/nll=2.5"}
        logs.put_log_events(logGroupName=group, logStreamName=stream, logEvents=[line])
        assert follow(job.name, account)["TrainingJobStatus"] == "Completed"
        shown = capsys.readouterr().out
        assert shown.count("step 1/2 loss/nll=2.5") == 1 and f"-- {job.name}: Completed" in shown

        def failed(parsed, **_):
            parsed |= {"TrainingJobStatus": "Failed", "FailureReason": "AlgorithmError: rank 3"}

        session.events.register("after-call.sagemaker.DescribeTrainingJob", failed)
        with pytest.raises(RuntimeError, match=f"job {job.name} failed: AlgorithmError: rank 3"):
            follow(job.name, account)
        with pytest.raises(ValueError, match="there is no training job nope in us-east-1"):
            follow("nope", account)


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
