"""Weights by file reach the other end through a folder and through an object store, and nothing is left behind."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from loops.shared.rollout.weight_transfer import FileTransport, buckets, read_tensors

BUCKET = [("a.weight", torch.arange(6.0).reshape(2, 3)), ("b", torch.full((4,), 0.1, dtype=torch.bfloat16))]


@pytest.fixture
def store(monkeypatch) -> Iterator[str]:
    """A bucket of moto's S3, over HTTP; the address carries what a machine's own settings would."""
    if not (importlib.util.find_spec("moto") and importlib.util.find_spec("flask_cors")):
        pytest.skip("needs moto[s3]")
    import boto3
    from moto.server import ThreadedMotoServer

    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "testing")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1").create_bucket(Bucket="weights")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    yield "s3://weights/of-the-runs"
    server.stop()


def arrives(folder: str) -> FileTransport:
    """Two buckets, one after the other, as the other end reads them when it is told."""
    transport, told = FileTransport(folder), []

    def control(method: str, **arguments: Any) -> None:
        told.append(method)
        if method == "update_weights":
            found.append(read_tensors(arguments["update_info"]["file"]))

    found: list[dict[str, torch.Tensor]] = []
    transport.open(control, 1)
    for bucket in buckets(BUCKET, limit=1):
        transport.send(control, bucket)
    assert told == ["init_weight_transfer_engine", "update_weights", "update_weights"]
    assert [list(tensors) for tensors in found] == [["a.weight"], ["b"]]
    for name, tensor in BUCKET:
        (arrived,) = (tensors[name] for tensors in found if name in tensors)
        assert arrived.dtype == tensor.dtype and torch.equal(arrived, tensor)
    return transport


def test_through_a_folder(tmp_path: Path):
    transport = arrives(str(tmp_path / "of the run"))
    assert [file.name for file in tmp_path.rglob("*.safetensors")] == ["weights-0.safetensors"]
    transport.close()
    transport.close()
    assert not list(tmp_path.iterdir())


def test_through_an_object_store(store: str):
    import os

    import boto3

    transport = arrives(f"{store}/sync-1")
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])

    def keys() -> list[str]:
        return [one["Key"] for one in client.list_objects_v2(Bucket="weights").get("Contents", [])]

    assert keys() == ["of-the-runs/sync-1/weights-0.safetensors"]
    transport.close()
    transport.close()
    assert set(keys()) <= {"of-the-runs/"}  # the sync_dir itself


def test_a_store_that_is_not_there_is_an_error(store: str):
    with pytest.raises(ValueError, match="sync_dir: s3://nowhere/run cannot be used"):
        FileTransport("s3://nowhere/run")
