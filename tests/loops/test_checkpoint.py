"""A resumed run is the same run to the last bit, and nothing but a whole checkpoint of this run is resumed."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import nn

from loops.shared.checkpoint import find_checkpoint, load_checkpoint, random_state, save_checkpoint
from loops.shared.optim import OptimConfig, build_optimizer, build_schedule

TOTAL, HALF = 6, 3
CONFIG = OptimConfig(learning_rate=0.05, warmup_steps=2, weight_decay=0.1)


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    AcceleratorState._reset_state(True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(True)


class Run:
    """The objects of a run, built fresh; rank and `salt` decide which random numbers they start from."""

    def __init__(
        self, accelerator: Accelerator, *, kind: str = "full", width: int = 8, salt: int = 0, dtype=torch.float32
    ):
        torch.manual_seed(1)
        model: nn.Module = nn.Sequential(
            nn.Linear(4, width), nn.LayerNorm(width), nn.Dropout(0.5), nn.Linear(width, 1)
        ).to(dtype)
        if kind == "lora":
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(model, LoraConfig(target_modules=["0", "3"], r=2, lora_dropout=0.5))
        if kind == "sharded":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            fully_shard(model, mesh=init_device_mesh("cpu", (accelerator.num_processes,)))
        self.accelerator = accelerator
        self.model = model if kind == "sharded" else accelerator.prepare(model)
        self.optimizer = accelerator.prepare(build_optimizer(self.model, CONFIG))
        self.scheduler = build_schedule(self.optimizer, CONFIG, TOTAL)
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

    def save(self, folder: Path, step: int, keep: int = 0, epoch: int = 1) -> Path:
        state = {"epoch": epoch, "rows": [1, 2]}
        return save_checkpoint(folder, step=step, state=state, keep=keep, **self.parts())

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


def assert_same(left: object, right: object, at: str = "") -> None:
    """Equal structure and equal bits."""
    if isinstance(left, torch.Tensor):
        assert isinstance(right, torch.Tensor) and left.dtype == right.dtype, at
        left, right = (t.to_local() if hasattr(t, "to_local") else t for t in (left, right))
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


def resume_is_exact(accelerator: Accelerator, folder: Path, kind: str, dtype=torch.float32) -> None:
    """6 steps, against 3 steps, a save, fresh objects with other random numbers, a load and 3 steps."""
    straight = Run(accelerator, kind=kind, dtype=dtype)
    straight.train(TOTAL)
    first = Run(accelerator, kind=kind, dtype=dtype)
    first.train(HALF)
    path = first.save(folder, HALF)
    second = Run(accelerator, kind=kind, salt=9, dtype=dtype)
    second.train(1)
    assert second.load(path) == {"epoch": 1, "rows": [1, 2], "step": HALF}
    second.train(TOTAL - HALF)
    assert_same(straight.everything(), second.everything())
    assert straight.optimizer.state_dict()["state"][0]["step"] == TOTAL


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_resume_is_bit_identical(accelerator: Accelerator, tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    resume_is_exact(accelerator, tmp_path, kind, dtype)


def test_resume_is_bit_identical_on_two_processes(tmp_path: Path) -> None:
    """DDP whole, DDP with LoRA, and FSDP2 shards (each rank has its own dropout and rows; files hold whole tensors).

    In a process of its own, since forked children hang after threaded work in the parent.
    """
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    for kind in ("full", "sharded"):
        (path,) = (tmp_path / kind / "checkpoints").iterdir()
        assert sorted(p.name for p in path.glob("random-*")) == ["random-00000.pt", "random-00001.pt"]
        assert load_file(path / "trainable.safetensors")["0.weight"].shape == (8, 4)


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


def test_a_frozen_base_is_not_written(accelerator: Accelerator, tmp_path: Path) -> None:
    run = Run(accelerator, kind="lora")
    names = load_file(run.save(tmp_path, 1) / "trainable.safetensors").keys()
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
    assert torch.equal(load_file(path / "trainable.safetensors")["0.weight"], run.model[0].weight)


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
        save_checkpoint(tmp_path, step=1, state={"rows": torch.ones(1)}, keep=0, **Run(accelerator).parts())
    assert not any(tmp_path.iterdir())


def cut_short(path: Path) -> None:
    with open(path / "trainable.safetensors", "r+b") as file:
        file.truncate(100)


DAMAGE = {
    "it has no manifest.json": lambda path: (path / "manifest.json").unlink(),
    "trainable.safetensors has 100 bytes instead of": cut_short,
    "random-00000.pt is missing": lambda path: (path / "random-00000.pt").unlink(),
    "is not JSON": lambda path: (path / "manifest.json").write_text("{"),
    "not a checkpoint of this program": lambda path: (path / "manifest.json").write_text('{"format": "other"}'),
}


@pytest.mark.parametrize("words", DAMAGE)
def test_a_torn_checkpoint_is_refused_and_latest_passes_over_it(
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


def test_another_optimizer_world_or_device_is_refused(accelerator: Accelerator, tmp_path: Path) -> None:
    run = Run(accelerator)
    path = run.save(tmp_path, 1)
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="AdamW over 2 parameter groups, not SGD over 1"):
        run.load(path)
    edit_manifest(path, world_size=4)
    with pytest.raises(ValueError, match="written by 4 processes and this run has 1: launch with --num_processes 4"):
        run.load(path)
    edit_manifest(path, world_size=1, device="cuda")
    with pytest.raises(ValueError, match="resume on cuda"):
        run.load(path)


def test_what_resume_from_means(accelerator: Accelerator, tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path, "none") is None
    assert find_checkpoint(tmp_path, "latest") is None
    path = Run(accelerator).save(tmp_path, 1)
    assert find_checkpoint(tmp_path, "none") is None
    assert find_checkpoint(tmp_path / "elsewhere", str(path)) == path
    with pytest.raises(ValueError, match="there is no checkpoint .*nowhere"):
        find_checkpoint(tmp_path, str(tmp_path / "nowhere"))


def two_processes(folder: str) -> None:
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    for kind in ("full", "lora", "sharded"):
        resume_is_exact(accelerator, Path(folder) / kind, kind)


if __name__ == "__main__":
    from accelerate import debug_launcher

    torch.set_num_threads(1)
    debug_launcher(two_processes, tuple(sys.argv[1:]), num_processes=2)
