"""Weights by file reach the other end through a folder, and nothing is left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from loops.shared.rollout.weight_transfer import FileTransport, buckets

BUCKET = [("a.weight", torch.arange(6.0).reshape(2, 3)), ("b", torch.full((4,), 0.1, dtype=torch.bfloat16))]


def test_through_a_folder(tmp_path: Path):
    """Two buckets, one after the other, as the other end reads them when it is told."""
    transport, told = FileTransport(tmp_path / "of the run"), []

    def control(method: str, **arguments: Any) -> None:
        told.append(method)
        if method == "update_weights":
            found.append({name: tensor.clone() for name, tensor in load_file(arguments["update_info"]["file"]).items()})

    found: list[dict[str, torch.Tensor]] = []
    transport.connect(control, 1)
    for bucket in buckets(BUCKET, limit=1):
        transport.send(control, bucket)
    assert told == ["init_weight_transfer_engine", "update_weights", "update_weights"]
    assert [list(tensors) for tensors in found] == [["a.weight"], ["b"]]
    for name, tensor in BUCKET:
        (arrived,) = (tensors[name] for tensors in found if name in tensors)
        assert arrived.dtype == tensor.dtype and torch.equal(arrived, tensor)
    assert [file.name for file in tmp_path.rglob("*.safetensors")] == ["weights-0.safetensors"]
    transport.close()
    transport.close()
    assert not list(tmp_path.iterdir())
