"""A resumed run is the same run to the last bit, and nothing but a whole checkpoint of this run is resumed.

What needs several processes runs once, in `main` below, in a process of its own: forked children hang after threaded
work in the parent.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from loops.shared import checkpoint
from loops.shared.checkpoint import NotSaved, Saver, load_checkpoint, random_state
from loops.shared.checkpoint_files import AlteredError, find_checkpoint, read_extra, read_manifest, read_weights
from loops.shared.optim import OptimConfig, build_optimizer, build_schedule, learning_rate_at

TOTAL, HALF = 6, 3
CONFIG = OptimConfig(learning_rate=0.05, warmup_steps=2, weight_decay=0.1)


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    AcceleratorState._reset_state(True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(True)


class Run:
    """The objects of a run, built fresh; rank and `salt` decide which random numbers they start from.

    kind: full (DDP on several processes), lora, sharded (FSDP2; `hybrid` 2 x 2 of 4). optimizer: a class other than
    AdamW, given the model's parameters. On 2 and more ranks some shards of the last layer are empty.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        *,
        kind: str = "full",
        width: int = 8,
        salt: int = 0,
        dtype=torch.float32,
        optimizer=None,
        config=CONFIG,
        total=TOTAL,
    ):
        torch.manual_seed(1)
        model: nn.Module = nn.Sequential(
            nn.Linear(4, width), nn.LayerNorm(width), nn.Dropout(0.5), nn.Linear(width, 1)
        ).to(dtype)
        if kind == "lora":
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(model, LoraConfig(target_modules=["0", "3"], r=2, lora_dropout=0.5))
        if kind in ("sharded", "hybrid"):
            count = accelerator.num_processes
            names = {"mesh_dim_names": ("copies", "shards")} if kind == "hybrid" else {}
            fully_shard(model, mesh=init_device_mesh("cpu", (2, count // 2) if kind == "hybrid" else (count,), **names))
        self.accelerator = accelerator
        self.model = model if kind in ("sharded", "hybrid") else accelerator.prepare(model)
        built = optimizer(self.model.parameters()) if optimizer else build_optimizer(self.model, config)
        self.optimizer = accelerator.prepare(built)
        self.scheduler = build_schedule(self.optimizer, config, total)
        seed = 10 * salt + accelerator.process_index
        random.seed(seed), numpy.random.seed(seed), torch.manual_seed(seed)

    def train(self, steps: int) -> None:
        """Each row depends on all three global random streams, so one lost stream changes every weight after it."""
        dtype = next(self.model.parameters()).dtype
        for _ in range(steps):
            rows = torch.randn(5, 4) + random.random() + float(numpy.random.standard_normal())
            self.model(rows.to(dtype)).pow(2).mean().backward()
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()

    def save(self, folder: Path, step: int, keep: int = 0, epoch: int = 1, **more) -> Path:
        state = {"epoch": epoch, "rows": [1, 2]}
        return self.begin(Saver(folder, accelerator=self.accelerator), step, keep, state=state, wait=True, **more)

    def begin(self, saver: Saver, step: int, keep: int = 0, **more) -> Path:
        """A save that training does not wait for."""
        parts = {name: part for name, part in self.parts().items() if name != "accelerator"}
        more = {"state": {"epoch": 1, "rows": [1, 2]}, "wait": False} | more
        saver.keep = keep
        return saver.save(**more | {"state": {**more["state"], "step": step}}, **parts)

    def load(self, path: Path) -> dict:
        return load_checkpoint(path, **self.parts())

    def parts(self) -> dict:
        return {
            "accelerator": self.accelerator,
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
        }

    def everything(self) -> dict:
        """All that a next step depends on; shards as this rank's part."""
        return {
            "weights": {name: p.detach().clone() for name, p in self.model.named_parameters()},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "random": random_state(torch.device("cpu")),
        }

    def whole(self) -> dict:
        """Weights and optimizer state by name, not as shards, and the schedule; the same for any number of ranks."""
        found: dict = {"scheduler": self.scheduler.state_dict()}
        for name, parameter in self.accelerator.unwrap_model(self.model).named_parameters():
            found[name] = unsharded(parameter)
            for key, value in self.optimizer.state[parameter].items():
                found[f"{name}/{key}"] = unsharded(value)
        return found


def unsharded(value: object) -> object:
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach()
    value = value.dequantize() if type(value).__name__ == "OptimState8bit" else value
    if hasattr(value, "to_local") and type(value.to_local()).__name__ == "OptimState8bit":
        local = value.to_local().dequantize()
        value = type(value).from_local(
            local, value.device_mesh, value.placements, shape=value.shape, stride=value.stride()
        )
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()


def assert_same(left: object, right: object, at: str = "") -> None:
    """Equal structure and equal bits."""
    if isinstance(left, torch.Tensor):
        assert isinstance(right, torch.Tensor) and left.dtype == right.dtype, at
        left, right = (t.to_local() if hasattr(t, "to_local") else t for t in (left, right))
        if type(left).__name__ == "OptimState8bit":
            assert_same((left.codes, left.scale), (right.codes, right.scale), at)
        else:
            assert torch.equal(left, right), at
    elif isinstance(left, dict):
        assert isinstance(right, dict) and left.keys() == right.keys(), at
        for key in left:
            assert_same(left[key], right[key], f"{at}/{key}")
    elif isinstance(left, (list, tuple)):
        assert isinstance(right, (list, tuple)) and len(left) == len(right), at
        for number, (one, other) in enumerate(zip(left, right, strict=True)):
            assert_same(one, other, f"{at}/{number}")
    else:
        assert left == right, at


def resume_is_exact(accelerator: Accelerator, folder: Path, kind: str, **options) -> None:
    """6 steps, against 3 steps, a save, fresh objects with other random numbers, a load and 3 steps."""
    straight = Run(accelerator, kind=kind, **options)
    straight.train(TOTAL)
    first = Run(accelerator, kind=kind, **options)
    first.train(HALF)
    path = first.save(folder, HALF)
    second = Run(accelerator, kind=kind, salt=9, **options)
    second.train(1)
    assert second.load(path) == {"epoch": 1, "rows": [1, 2], "step": HALF}
    second.train(TOTAL - HALF)
    assert_same(straight.everything(), second.everything())
    assert straight.optimizer.state_dict()["state"][0]["step"] == TOTAL


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_resume_is_bit_identical(accelerator: Accelerator, tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    resume_is_exact(accelerator, tmp_path, kind, dtype=dtype)


def test_a_resumed_run_takes_the_optimizer_settings_it_is_given(accelerator: Accelerator, tmp_path: Path) -> None:
    """From its first step on: rate, decay and betas of the new config, moments of the checkpoint."""
    run = Run(accelerator)
    run.train(HALF)
    path = run.save(tmp_path, HALF)
    new = replace(CONFIG, learning_rate=0.01, weight_decay=0.5, adam_beta2=0.9)
    other = Run(accelerator, config=new, total=2 * TOTAL)
    other.load(path)
    rate = learning_rate_at(HALF, new, 2 * TOTAL)
    assert other.scheduler.get_last_lr() == [rate, rate] != run.scheduler.get_last_lr()
    for group, decay in zip(other.optimizer.param_groups, (0.5, 0.0), strict=True):
        assert (group["lr"], group["weight_decay"], group["betas"]) == (rate, decay, (0.9, 0.9))
    assert_same(run.optimizer.state_dict()["state"], other.optimizer.state_dict()["state"])


def test_a_checkpoint_of_an_untrained_run_loads(accelerator: Accelerator, tmp_path: Path) -> None:
    """Before its first step AdamW has no moments; that state too comes back."""
    run = Run(accelerator)
    path = run.save(tmp_path, 0)
    other = Run(accelerator, salt=1)
    other.load(path)
    assert_same(run.everything(), other.everything())


def test_name_shows_kind_epoch_and_step(accelerator: Accelerator, tmp_path: Path) -> None:
    assert Run(accelerator).save(tmp_path, 12, epoch=2).name == "full-epoch02-step000012"
    assert Run(accelerator, kind="lora").save(tmp_path, 12, epoch=2).name == "lora-epoch02-step000012"


def test_what_cannot_be_tidied_away_costs_no_save(
    accelerator: Accelerator, tmp_path: Path, monkeypatch, caplog
) -> None:
    """A checkpoint that was moved to another disk, with a link in its place, and a leftover that somebody holds."""
    run = Run(accelerator)
    first = run.save(tmp_path, 1)
    shutil.move(first, tmp_path / "far")
    first.symlink_to(tmp_path / "far")
    held = tmp_path / "checkpoints/.tmp-held"
    held.mkdir()
    remove = shutil.rmtree

    def refuse(path, *more, **named):
        if Path(path) == held:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        remove(path, *more, **named)

    monkeypatch.setattr(shutil, "rmtree", refuse)
    for step in (2, 3):
        path = run.save(tmp_path, step, keep=1)
        assert find_checkpoint(tmp_path, "latest") == path
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {path.name, held.name}
    assert (tmp_path / "far/manifest.json").exists() and "cannot be removed" in caplog.text


def test_only_a_full_disk_is_told_as_one(accelerator: Accelerator, tmp_path: Path, monkeypatch) -> None:
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(NotSaved, match="Input/output error") as caught:
        Run(accelerator).save(tmp_path, 1)
    assert "free" not in str(caught.value)


def test_a_manifest_that_lacks_a_part_is_passed_over_and_a_run_folder_is_no_checkpoint(
    accelerator: Accelerator, tmp_path: Path
) -> None:
    run = Run(accelerator)
    good, bad = run.save(tmp_path, 1), run.save(tmp_path, 2)
    manifest = json.loads((bad / "manifest.json").read_text())
    for key in ("files", "saved_at"):
        (bad / "manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if k != key}))
        assert find_checkpoint(tmp_path, "latest") == good
    with pytest.raises(ValueError, match="is a run folder.*latest"):
        find_checkpoint(tmp_path, str(tmp_path))


def test_a_frozen_base_is_not_written(accelerator: Accelerator, tmp_path: Path) -> None:
    run = Run(accelerator, kind="lora")
    names = read_weights(run.save(tmp_path, 1)).keys()
    assert names == {name for name, p in run.model.named_parameters() if p.requires_grad} and len(names) == 4


def test_only_the_newest_are_kept(accelerator: Accelerator, tmp_path: Path) -> None:
    run = Run(accelerator)
    for step in (1, 2, 3):
        run.save(tmp_path, step, keep=2)
    assert [int(p.name[-6:]) for p in sorted((tmp_path / "checkpoints").iterdir())] == [2, 3]
    run.save(tmp_path, 4, keep=0)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3


def test_newest_is_by_time_after_going_back(accelerator: Accelerator, tmp_path: Path) -> None:
    """A run sent back from step 9 to step 3 writes step 4: that one is the latest and is not pruned."""
    run = Run(accelerator)
    run.save(tmp_path, 9)
    written = run.save(tmp_path, 4, keep=1)
    assert list((tmp_path / "checkpoints").iterdir()) == [written]
    assert find_checkpoint(tmp_path, "latest") == written


def test_the_same_step_can_be_saved_again(accelerator: Accelerator, tmp_path: Path) -> None:
    run = Run(accelerator)
    run.save(tmp_path, 1)
    run.train(1)
    path = run.save(tmp_path, 1)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [path.name]
    assert torch.equal(read_weights(path)["0.weight"], run.model[0].weight)


def test_a_save_that_dies_leaves_the_last_one(
    accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before the rename (everything written) and in the middle of writing; the next save clears the rest."""
    run = Run(accelerator)
    good = run.save(tmp_path, 1)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    for target in ("os.replace", "torch.save"):
        with monkeypatch.context() as patch:
            patch.setattr(target, die)
            with pytest.raises(KeyboardInterrupt):
                run.save(tmp_path, 2)
        assert find_checkpoint(tmp_path, "latest") == good
        assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    new = run.save(tmp_path, 3)
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {good.name, new.name}


def test_a_state_that_is_not_json_writes_nothing(accelerator: Accelerator, tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        Run(accelerator).begin(Saver(tmp_path, accelerator=accelerator), 1, state={"rows": torch.ones(1)})
    assert not any(tmp_path.iterdir())


def cut_short(path: Path) -> None:
    with open(path / "__0_0.distcp", "r+b") as file:
        file.truncate(100)


def flip_a_bit(path: Path) -> None:
    data = bytearray((path / "__0_0.distcp").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "__0_0.distcp").write_bytes(data)


DAMAGE = {
    "it has no manifest.json": lambda path: (path / "manifest.json").unlink(),
    "__0_0.distcp has 100 bytes instead of": cut_short,
    "rank-00000.pt is missing": lambda path: (path / "rank-00000.pt").unlink(),
    "is not JSON": lambda path: (path / "manifest.json").write_text("{"),
    "not a checkpoint of this program": lambda path: (path / "manifest.json").write_text('{"format": "other"}'),
}


@pytest.mark.parametrize("words", DAMAGE)
def test_an_incomplete_checkpoint_is_refused_and_latest_passes_over_it(
    accelerator: Accelerator, tmp_path: Path, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(accelerator)
    good, torn = run.save(tmp_path, 1), run.save(tmp_path, 2)
    DAMAGE[words](torn)
    with pytest.raises(ValueError, match=words):
        run.load(torn)
    with pytest.raises(ValueError, match=words):
        find_checkpoint(tmp_path, str(torn))
    assert find_checkpoint(tmp_path, "latest") == good
    (record,) = caplog.records
    assert words in record.message and torn.name in record.message


def edit_manifest(path: Path, **changes: object) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, **changes}))


@pytest.mark.parametrize(
    ("words", "other"),
    [
        (r"0.weight is \(8, 4\) torch.float32 there and \(9, 4\) torch.float32 here", {"width": 9}),
        ("0.weight is .*float32 there and .*float64 here", {"dtype": torch.float64}),
        ("6 of its 6 parameters are unknown and 4 of the model's 4 are missing", {"kind": "lora"}),
    ],
)
def test_a_foreign_checkpoint_is_refused_and_changes_nothing(
    accelerator: Accelerator, tmp_path: Path, words: str, other: dict
) -> None:
    path = Run(accelerator).save(tmp_path, 1)
    run = Run(accelerator, salt=1, **other)
    run.train(1)
    before = run.everything()
    with pytest.raises(ValueError, match=words):
        run.load(path)
    assert_same(before, run.everything())


def test_an_altered_byte_is_found(accelerator: Accelerator, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By its checksum, when it is read: the size is right. (`latest` then goes to the one before: test_runs.py.)"""
    run = Run(accelerator)
    good, torn = run.save(tmp_path, 1), run.save(tmp_path, 2)
    flip_a_bit(torn)
    for read in (run.load, read_weights):
        with pytest.raises(ValueError, match="__0_0.distcp was altered after it was written"):
            read(torn)
    caplog.clear()
    assert find_checkpoint(tmp_path, "latest", without=[torn]) == good and not caplog.records
    (torn / "optimizer.pt").write_bytes(bytes((torn / "optimizer.pt").stat().st_size))
    assert find_checkpoint(tmp_path, "latest") == good
    assert ["altered" in record.message for record in caplog.records] == [True]


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts bytes as Linux does")
def test_a_resume_reads_a_checkpoint_once(accelerator: Accelerator, tmp_path: Path) -> None:
    """`latest` is found and loaded, its checksums are compared, and each byte is read once (and 5 % for the rest)."""

    def bytes_read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    run = Run(accelerator, width=200_000)
    run.train(1)
    size = sum(file.stat().st_size for file in run.save(tmp_path, 1).iterdir())
    before = bytes_read()
    run.load(find_checkpoint(tmp_path, "latest", accelerator=accelerator))
    assert size > 10_000_000 and bytes_read() - before < 1.05 * size


def test_another_optimizer_or_device_is_refused(accelerator: Accelerator, tmp_path: Path) -> None:
    run = Run(accelerator)
    path = run.save(tmp_path, 1)
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="AdamW over 2 parameter groups, not SGD over 1"):
        run.load(path)
    edit_manifest(path, device="cuda")
    with pytest.raises(ValueError, match="resume on cuda"):
        run.load(path)


def test_exports_beside_checkpoints_are_passed_over_in_silence(
    accelerator: Accelerator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`launch.export` writes CHECKPOINT.hf_model and CHECKPOINT.hf_peft, which are neither torn nor pruned."""
    run = Run(accelerator)
    path = run.save(tmp_path, 1)
    exports = [Path(f"{path}{ending}") for ending in (".hf_model", ".hf_peft")]
    for export in exports:
        export.mkdir()
    assert find_checkpoint(tmp_path, "latest") == path
    new = run.save(tmp_path, 2, keep=1)
    assert sorted((tmp_path / "checkpoints").iterdir()) == [*exports, new]
    assert not caplog.records


def test_what_resume_from_means(accelerator: Accelerator, tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path, "none") is None
    assert find_checkpoint(tmp_path, "latest") is None
    path = Run(accelerator).save(tmp_path, 1)
    assert find_checkpoint(tmp_path, "none") is None
    assert find_checkpoint(tmp_path / "elsewhere", str(path)) == path
    with pytest.raises(ValueError, match="there is no checkpoint .*nowhere"):
        find_checkpoint(tmp_path, str(tmp_path / "nowhere"))


def test_extra_comes_back_by_rank(accelerator: Accelerator, tmp_path: Path) -> None:
    """Rollouts not yet consumed, engine seeds and the like; what could not be read again is refused before a file."""
    run = Run(accelerator)
    extra = {"rollouts": [{"ids": [1, 2], "logprobs": torch.tensor([0.5, 0.25])}], "seed": 7}
    path = run.save(tmp_path, 1, extra=extra)
    assert_same(read_extra(path, 0), extra)
    assert read_extra(run.save(tmp_path, 2), 0) == {}
    with pytest.raises(ValueError, match="extra holds what a checkpoint cannot give back"):
        run.save(tmp_path, 3, extra={"path": Path("x")})
    assert find_checkpoint(tmp_path, "latest").name.endswith("2")


def test_the_best_is_kept_besides_the_newest(accelerator: Accelerator, tmp_path: Path) -> None:
    """Losses 3, 1, 2, nan, none with two kept: the second stays although it is older; with accuracies it is another."""
    run, folder = Run(accelerator), tmp_path / "least"
    for step, loss in enumerate((3.0, 1.0, 2.0, float("nan")), 1):
        run.save(folder, step, keep=2, best=("eval/loss", loss, False))
    run.save(folder, 5, keep=2)  # a save without an evaluation forgets nothing
    assert sorted(int(p.name[-6:]) for p in (folder / "checkpoints").iterdir()) == [2, 4, 5]
    best = find_checkpoint(folder, "best")
    assert read_manifest(best)["metrics"] == {"eval/loss": 1.0}
    for step, accuracy in enumerate((0.5, 0.7, 0.7, 0.6, 0.1), 1):
        run.save(tmp_path, step, keep=1, best=("eval/accuracy", accuracy, True))
    assert sorted(int(p.name[-6:]) for p in (tmp_path / "checkpoints").iterdir()) == [2, 5]  # the older of equals
    assert find_checkpoint(folder / "nowhere", "best") is None


def test_training_goes_on_while_a_checkpoint_is_written(
    accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files hold what was true at the save, though writing only began after two more steps."""
    run, saver, gate = Run(accelerator), Saver(tmp_path, accelerator=accelerator), threading.Event()
    write = checkpoint._Writer.write_data
    monkeypatch.setattr(checkpoint._Writer, "write_data", lambda *given: gate.wait(20) and write(*given))
    run.train(1)
    at_save = run.everything()
    at_save = torch.load(_bytes(at_save), weights_only=False)
    path = run.begin(saver, 1)
    run.train(2)
    assert not path.exists() and find_checkpoint(tmp_path, "latest") is None
    gate.set()
    saver.wait()
    other = Run(accelerator, salt=3)
    other.load(path)
    assert_same(other.everything(), at_save)
    buffers = {key: buffer.data_ptr() for key, buffer in saver.buffers.items()}
    run.begin(saver, 3)
    second = run.begin(saver, 4)  # waits for the one before
    saver.wait()
    assert {key: buffer.data_ptr() for key, buffer in saver.buffers.items()} == buffers  # staging takes no new memory
    assert sorted(p.name[-1] for p in (tmp_path / "checkpoints").iterdir()) == ["1", "3", "4"]
    run.train(1)
    assert torch.equal(read_weights(second)["0.weight"], other.model[0].weight) is False


def _bytes(value: object):
    import io

    return io.BytesIO(checkpoint.packed(value))


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("how", ["disk", "limit"])
def test_a_full_disk_keeps_the_last_checkpoint(accelerator: Accelerator, tmp_path: Path, how: str, wait: bool) -> None:
    """A disk of 256 KiB (where this may be mounted) or files of at most 64 KiB, and a checkpoint of 280 KiB."""
    small, large = Run(accelerator), Run(accelerator, width=3000)
    large.train(1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if how == "disk":
        command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
            pytest.skip("a small disk cannot be mounted here")
    saver = Saver(tmp_path, accelerator=accelerator)
    try:
        good = small.save(tmp_path, 1)
        if how == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (65536, limits[1]))
        with pytest.raises(NotSaved, match=r"step000002 was not saved \(.*needs 0.3 MiB and .* MiB are free") as caught:
            if wait:
                large.save(tmp_path, 2)
            large.begin(saver, 2)
            saver.wait()
        assert os.strerror(errno.ENOSPC if how == "disk" else errno.EFBIG) in str(caught.value)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert list((tmp_path / "checkpoints").iterdir()) == [good] and read_weights(good)
        small.begin(saver, 3)  # and the next save is as good as any
        saver.wait()
        assert find_checkpoint(tmp_path, "latest").name.endswith("3")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        if how == "disk":
            subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit", "Lion8bit"])
def test_bitsandbytes_resumes_to_the_same_bits(accelerator: Accelerator, tmp_path: Path, name: str) -> None:
    """4 x 1100 elements have 8-bit moments, the other parameters whole ones."""
    optim = pytest.importorskip("bitsandbytes").optim

    def build(parameters):
        return getattr(optim, name)(parameters, lr=0.01)

    resume_is_exact(accelerator, tmp_path, "full", width=1100, optimizer=build)
    (path,) = (tmp_path / "checkpoints").iterdir()
    stored = FileSystemReader(path).read_metadata().state_dict_metadata
    assert stored["optimizer/0.weight/state1"].properties.dtype == torch.uint8
    assert stored["optimizer/0.bias/state1"].properties.dtype == torch.float32
    adamw = Run(accelerator, width=1100)
    with pytest.raises(ValueError, match=f"another optimizer .bitsandbytes.{name} over 1 parameter groups, not AdamW"):
        adamw.load(path)


@pytest.mark.slow
def test_other_numbers_of_processes_and_kills(tmp_path: Path) -> None:
    """All of `main`, in one process and its forks."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(root), *sys.path[1:]])}
    command = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == "all held"


def on_two(folder: Path) -> None:
    """Resume on as many ranks; checkpoints for other numbers; a save in the background; failures of one rank."""
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    assert accelerator.num_processes == 2
    for kind in ("full", "lora", "sharded"):
        resume_is_exact(accelerator, folder / f"resume-{kind}", kind)
    for kind in ("full", "sharded"):
        (path,) = (folder / f"resume-{kind}" / "checkpoints").iterdir()
        assert sorted(p.name for p in path.glob("rank-*")) == ["rank-00000.pt", "rank-00001.pt"]
        assert read_weights(path)["0.weight"].shape == (8, 4)
        chunks = FileSystemReader(path).read_metadata().state_dict_metadata["model/0.weight"].chunks
        assert [tuple(chunk.sizes) for chunk in chunks] == ([(8, 4)] if kind == "full" else [(4, 4)] * 2)
    for kind, optimizer in kinds().items():
        run = Run(accelerator, kind=kind.removesuffix("-torchao"), width=WIDTH, optimizer=optimizer)
        run.train(HALF)
        keep_whole(run, folder / kind, rank)
        run.save(folder / kind, HALF)

    if "sharded-torchao" in kinds():
        for width in (EVEN, UNEVEN):
            resume_is_exact(accelerator, folder / f"eight-{width}", "sharded", width=width, optimizer=eight_bit)
        run = Run(accelerator, width=EVEN, optimizer=eight_bit)
        run.train(HALF)
        keep_whole(run, folder / "eight-full", rank)
        run.save(folder / "eight-full", HALF)

    # In the background: both ranks train on while their threads write.
    run, saver = Run(accelerator, kind="sharded"), Saver(folder / "background", accelerator=accelerator)
    run.begin(saver, 0)  # before AdamW has moments: the next save has more to write
    run.train(1)
    before = run.whole()
    evaluate(run)
    path = run.begin(saver, 1, keep=1, extra={"rank": rank})
    run.train(2)
    saver.wait()
    assert [read_extra(path, r) for r in (0, 1)] == [{"rank": 0}, {"rank": 1}]
    other = Run(accelerator, kind="sharded", salt=4)
    evaluate(other)
    other.load(path)
    assert_same(before, other.whole())

    # One rank's disk is full; one rank writes nothing: all ranks hear of it.
    def fails(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def hangs(*_: object) -> None:
        time.sleep(4)
        raise ValueError("too late")

    write = checkpoint._Writer.write_data
    for broken, words in ((fails, "No space left on device"), (hangs, "rank 1 wrote nothing for 1 seconds")):
        checkpoint._Writer.write_data = broken if rank == 1 else write
        saver.deadline = 1.0 if broken is hangs else saver.deadline
        run.begin(saver, 2)
        with expect(NotSaved, words):
            saver.wait()
        checkpoint._Writer.write_data = write
        accelerator.wait_for_everyone()
        assert list((folder / "background" / "checkpoints").iterdir()) == [path]

    # A byte that only rank 1 compares, and a state that only rank 1 cannot write.
    name = "__1_0.distcp"
    accelerator.wait_for_everyone()
    if rank == 0:
        data = bytearray((path / name).read_bytes())
        (path / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    accelerator.wait_for_everyone()
    shards = run.everything()
    with expect(AlteredError, f"{name} was altered"):
        run.load(path)
    assert_same(shards, run.everything())
    assert find_checkpoint(folder / "background", "latest", accelerator=accelerator, without=[path]) is None
    with expect(ValueError, "extra holds"):
        run.begin(saver, 3, extra={"path": Path("x")} if rank == 1 else None)
    for kind, optimizer in kinds().items():
        without_a_shared_disk(accelerator, folder / f"apart-{kind}", kind.removesuffix("-torchao"), optimizer)


def on_own_disk(folder: Path, rank: int) -> Path:
    """The same relative paths are then other places on every machine."""
    machine = folder / f"machine-{rank}"
    machine.mkdir(parents=True, exist_ok=True)
    os.chdir(machine)
    return machine


def without_a_shared_disk(accelerator: Accelerator, folder: Path, kind: str, optimizer) -> None:
    """Two machines: all is on the first one's disk, nothing on the other's, and copies of it resume to the bit."""
    rank, run_folder = accelerator.process_index, Path("run")
    machine = on_own_disk(folder, rank)
    options: dict = {"kind": kind, "width": UNEVEN if optimizer else 8, "optimizer": optimizer}
    straight = Run(accelerator, **options)
    straight.train(TOTAL)
    run, saver = Run(accelerator, **options), Saver(run_folder, accelerator=accelerator)
    with captured() as records:
        run.train(1)
        run.save(run_folder, 1, extra={"rank": rank})  # which waits, and stages nothing of its own
        run.begin(saver, 2)
        run.train(HALF - 1)
        before, at_save = run.whole(), run.everything()
        at_save = torch.load(_bytes(at_save), weights_only=False)
        path = run.begin(saver, HALF, keep=2, extra={"rank": rank})
        run.train(1)
        saver.wait()
    assert [record.getMessage()[:29] for record in records] == ["1 of 2 ranks, the first of th"] * 2 * (rank == 0)
    accelerator.wait_for_everyone()
    if rank == 1:
        assert not any(machine.iterdir())
    else:
        assert len(list(path.parent.iterdir())) == 2
        assert_same(read_weights(path), {name: before[name] for name in read_weights(path)})

    # The other machine has no checkpoint; then another of that name.
    run = Run(accelerator, salt=3, **options)
    new = run.everything()
    for _ in range(2):
        for refused in (
            lambda: find_checkpoint(run_folder, "latest", accelerator=accelerator),
            lambda: find_checkpoint(run_folder, str(path), accelerator=accelerator),
            lambda: run.load(path),
        ):
            with expect(ValueError, f"rank 1 does not see the checkpoint that rank 0 has in {path}: copy it to"):
                refused()
        if rank == 1:
            shutil.copytree(folder / "machine-0" / "run", machine / "run", dirs_exist_ok=True)
            edit_manifest(path, saved_at=1)
    assert_same(new, run.everything())

    # What a new SageMaker job finds: all of the first disk on every machine, with what a kill left there.
    left_over = path.parent / f".tmp-{path.name[:-1]}4"
    if rank == 0:
        left_over.mkdir()
        (left_over / "0.report").write_text("1")
    accelerator.wait_for_everyone()
    if rank == 1:
        shutil.copytree(folder / "machine-0" / "run", machine / "run", dirs_exist_ok=True)
    assert find_checkpoint(run_folder, "latest", accelerator=accelerator) == path
    assert_same([read_extra(path, r) for r in (0, 1)], [{"rank": 0}, {"rank": 1}])
    run.load(path)
    assert_same(at_save, run.everything())
    run.train(TOTAL - HALF)
    assert_same(straight.everything(), run.everything())
    path = run.save(run_folder, HALF + 1)
    assert path.exists() is (rank == 0) and [p.name for p in left_over.glob("*")] == ["0.report"] * (rank == 1)


class captured:
    """`caplog` for a fork."""

    def __enter__(self) -> list[logging.LogRecord]:
        records: list[logging.LogRecord] = []
        self.handler = logging.Handler()
        self.handler.emit = records.append  # type: ignore[method-assign]
        checkpoint.logger.addHandler(self.handler)
        return records

    def __exit__(self, *_: object) -> None:
        checkpoint.logger.removeHandler(self.handler)


def evaluate(run: Run) -> None:
    """A forward without a backward leaves FSDP2's root gathered: its parameters are whole, plain tensors."""
    with torch.no_grad():
        run.model(torch.zeros(1, 4))
    assert not any(hasattr(parameter, "to_local") for parameter in run.model.parameters())


def on_four(folder: Path) -> None:
    """What two wrote, sharded over four and over 2 x 2; 8-bit moments of two shards fit no four."""
    accelerator = Accelerator(cpu=True)
    for kind in ("sharded", "hybrid"):
        run = Run(accelerator, kind=kind, width=WIDTH, salt=5)
        same_whole_after_load(run, folder / "sharded", reseeded=True)
        run.save(folder / f"{kind}-4", HALF)
        (path,) = (folder / f"{kind}-4" / "checkpoints").iterdir()
        chunks = FileSystemReader(path).read_metadata().state_dict_metadata["model/0.weight"].chunks
        assert len(chunks) == (4 if kind == "sharded" else 2)  # copies are written once
    if "sharded-torchao" in kinds():
        for name in (f"eight-{EVEN}", "eight-full"):
            run = Run(accelerator, kind="sharded", width=EVEN, optimizer=eight_bit)
            before = run.everything()
            with expect(ValueError, "resume on as many processes as wrote it"):
                run.load(find_checkpoint(folder / name, "latest"))
            assert_same(before, run.everything())

    # Two machines of two: only what none of the first machine's ranks holds goes over, each piece once.
    rank = accelerator.process_index
    machine = on_own_disk(folder / "two-machines", rank // 2)
    for kind in ("full", "hybrid", "sharded"):
        run, saver = Run(accelerator, kind=kind, salt=8), Saver(kind, accelerator=accelerator)
        run.train(1)
        before = run.whole()
        path = run.begin(saver, 1, extra={"rank": rank})
        saver.wait()
        sent = {source: len(items) for source, items in saver.agreed.sent.items()}
        assert sent == {2: 4 * 3 * (kind == "sharded"), 3: 4 * 3 * (kind == "sharded")}, sent
        if rank < 2:
            assert_same(read_weights(path), {name: before[name] for name in read_weights(path)})
            assert [read_extra(path, r)["rank"] for r in range(4)] == [0, 1, 2, 3]
        accelerator.wait_for_everyone()
        if rank == 3:
            assert not any(machine.iterdir())
            shutil.copytree(folder / "two-machines" / "machine-0" / kind, kind)
        accelerator.wait_for_everyone()
        other = Run(accelerator, kind=kind, salt=9)
        other.load(path)
        assert_same(before, other.whole())
        accelerator.wait_for_everyone()
        if rank == 3:
            shutil.rmtree(kind)


def on_one(folder: Path) -> None:
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True)
    for source in ("sharded-4", "hybrid-4", "full"):  # FSDP2 x 2 -> x 4 -> 1, DDP x 2 -> 1
        run = Run(accelerator, width=WIDTH, salt=6)
        same_whole_after_load(run, folder / source.removesuffix("-4").replace("hybrid", "sharded"), folder / source)
        assert_same(read_weights(find_checkpoint(folder / source, "latest")), dict(run.model.named_parameters()))
    run.save(folder / "full-1", HALF)
    if "sharded-torchao" in kinds():
        run = Run(accelerator, width=EVEN, salt=6, optimizer=eight_bit)  # DDP x 2 -> 1
        same_whole_after_load(run, folder / "eight-full")
        assert has_eight_bits(run)
        with expect(ValueError, "resume on as many processes as wrote it"):
            run.load(find_checkpoint(folder / f"eight-{EVEN}", "latest"))
    no_kill_leaves_nothing(accelerator, folder / "killed")


def again_on_two(folder: Path) -> None:
    """DDP x 2 -> 1 -> FSDP2 x 2, and every rank's streams are its own and the same each time."""
    accelerator = Accelerator(cpu=True)
    run = Run(accelerator, kind="sharded", width=WIDTH, salt=7)
    same_whole_after_load(run, folder / "full", folder / "full-1", reseeded=True)
    once = random_state(torch.device("cpu"))
    run.load(find_checkpoint(folder / "full-1", "latest"))
    assert_same(once, random_state(torch.device("cpu")))
    (folder / f"drawn-{accelerator.process_index}").write_text(f"{random.random()} {torch.rand(())}")
    accelerator.wait_for_everyone()
    assert (folder / "drawn-0").read_text() != (folder / "drawn-1").read_text()


# Columns of 4: of 2048 rows both ranks have 4,096 elements, enough for torchao's 8 bits; of 2047 only the first.
WIDTH, EVEN, UNEVEN = 2176, 2048, 2047


def kinds() -> dict:
    """What is trained on two ranks: a name, and the optimizer where it is not ours."""
    found: dict = {"full": None, "sharded": None}
    if importlib.util.find_spec("torchao"):
        found["sharded-torchao"] = eight_bit
    return found


def eight_bit(parameters):
    from torchao.optim import AdamW8bit

    torch.compiler.set_stance("force_eager")
    return AdamW8bit(parameters, lr=0.01)


def has_eight_bits(run: Run) -> bool:
    moment = run.optimizer.state[run.model[0].weight]["exp_avg"]
    return type(moment.to_local() if hasattr(moment, "to_local") else moment).__name__ == "OptimState8bit"


def keep_whole(run: Run, folder: Path, rank: int) -> None:
    whole = run.whole()
    if rank == 0:
        folder.mkdir(parents=True)
        torch.save(whole, folder / "whole.pt")


def same_whole_after_load(run: Run, reference: Path, folder: Path | None = None, reseeded: bool = True) -> None:
    with captured() as records:
        run.load(find_checkpoint(folder or reference, "latest"))
    assert_same(torch.load(reference / "whole.pt", weights_only=False), run.whole())
    assert len(records) == (reseeded and run.accelerator.is_main_process)
    assert not reseeded or not records or "seeded anew" in records[0].getMessage()


class expect:
    """`pytest.raises` for a fork."""

    def __init__(self, kind: type[BaseException], words: str):
        self.kind, self.words = kind, words

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, _) -> bool:
        assert kind is self.kind and self.words in str(error), f"{kind} {error}"
        return True


def no_kill_leaves_nothing(accelerator: Accelerator, folder: Path) -> None:
    """SIGKILL before each change to a file system that a save makes, one after the other; what is found is whole.

    Only one checkpoint may stay, and in the second round each save takes the place of the one that is there.
    """
    run = Run(accelerator)
    for name, one_more in (("new", 1), ("replacing", 0)):
        step = 1
        run.save(folder / name, step)
        died, number = True, 0
        while died:
            number += 1
            child = os.fork()
            if child == 0:
                die_before(number)
                run.save(folder / name, step + one_more, keep=1)
                os._exit(0)
            died = os.waitpid(child, 0)[1] != 0
            found = find_checkpoint(folder / name, "latest")
            assert found is not None, f"{name}: nothing is left by a kill before change {number}"
            assert Run(accelerator).load(found)["step"] in (step, step + one_more)
            step += 2 * one_more
            path = run.save(folder / name, step, keep=1)
            assert list(path.parent.iterdir()) == [path]  # what the killed one left is gone
        assert number > 15


def die_before(number: int) -> None:
    left = [number]

    def hook(event: str, given: tuple) -> None:
        writes = event == "open" and isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def main(folder: Path) -> None:
    from accelerate import debug_launcher

    torch.set_num_threads(1)
    debug_launcher(on_two, (folder,), num_processes=2)
    debug_launcher(on_four, (folder,), num_processes=4)
    on_one(folder)
    AcceleratorState._reset_state(True)
    debug_launcher(again_on_two, (folder,), num_processes=2)
    print("all held")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
