"""Runs a loop's own `main`, with the `for` over its steps, on a model and encoded rows that a test makes."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import AutoTokenizer

from configs.loader import load_config
from data.chat import EncodeReport
from data.rewards import RewardResult
from loops import dpo, grpo, sft
from loops.shared.rollout import Completion, SyncReport
from loops.shared.run import Run

SEED = 42
HOUSE = Path(__file__).resolve().parents[2]
LOOPS = {"sft": sft, "dpo": dpo, "grpo": grpo}


class RecordedEngine:
    """Answers each prompt of a step with completions that were recorded: `groups[prompt number]`."""

    is_off_policy = False
    weight_version = 0

    def __init__(self, groups_of_step, rewards_of_step):
        """Of a step (from 0), per place in it: a group of completions (token ids), and a group of their rewards."""
        self._groups_of_step, self._rewards_of_step = groups_of_step, rewards_of_step
        self._rewards: dict[int, float] = {}

    def sync(self, policy) -> SyncReport:
        self.weight_version += 1
        return SyncReport(weight_version=self.weight_version, tensors=0, bytes=0, seconds=0.0)

    def sample(self, prompts, *, n, sampling, seed, prompt_numbers, arrived=None):
        step = (seed - SEED) // 1_000_003
        groups, rewards = self._groups_of_step(step), self._rewards_of_step(step)
        sampled = []
        for place in prompt_numbers:
            group = [Completion(ids, [-4.5] * len(ids), "stop", "", self.weight_version) for ids in groups[place]]
            self._rewards |= {id(one): float(reward) for one, reward in zip(group, rewards[place], strict=True)}
            sampled.append(group)
        self._kept = sampled  # ids stay theirs
        return sampled

    def rewards(self, prompts, completions) -> RewardResult:
        """The `reward_fn` that goes with them."""
        total = [self._rewards[id(one)] for one in completions]
        return RewardResult(total, {"recorded": list(total)}, {"recorded": []}, None)

    def sleep(self) -> None:
        pass

    def close(self) -> None:
        pass


def sgd(policy, *_, **__) -> torch.optim.Optimizer:
    """Of rate 1: the change of the weights is the gradient."""
    return torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=1.0)


def run_loop(
    loop: str,
    folder: Path,
    rows: Sequence[Any],
    *options: str,
    policy: torch.nn.Module,
    engine: Any = None,
    build_optimizer: Any = sgd,
) -> tuple[list[dict], torch.nn.Module]:
    """(rows of metrics.jsonl, the policy as it was trained: wrapped or sharded).

    rows: encoded examples, pairs or prompts. What makes the model, the rows, the optimizer and the engine is replaced,
    and the export left out; everything else is the loop's own. Options are those of its command line.
    """
    module, trained = LOOPS[loop], []
    room = {"sft": module, "dpo": module, "grpo": getattr(module, "chat", None)}[loop]
    common = ["--config", f"configs/{loop}.yaml", "--output_dir", str(folder), "--seed", str(SEED)]
    common += ["--log_completions_steps", "0"]
    if build_optimizer is sgd:
        common += ["--warmup_steps", "0", "--learning_rate", "1", "--min_learning_rate", "1"]
    AcceleratorState._reset_state(True)
    threads, environment = torch.get_num_threads(), dict(os.environ)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(HOUSE)
        patch.setattr(module, "load_rows", lambda *_, **__: ([{"answer": ""}] * len(rows), None))
        encoded = lambda given, *_, **__: (list(rows) if given else [], EncodeReport("rows", stop_tokens=set()))  # noqa: E731
        patch.setattr(room, "encode_rows", encoded)
        tokenizer = AutoTokenizer.from_pretrained("data/quickstart/model")
        patch.setattr(module.models, "build_tokenizer", lambda *_: tokenizer)
        patch.setattr(module.models, "build_policy", lambda *_, **__: policy)
        if build_optimizer is not None:
            patch.setattr(module.optim, "build_optimizer", build_optimizer)
        patch.setattr(module.rollout, "build_engine", lambda *_, **__: engine)
        if engine is not None:
            patch.setattr(module, "build_reward_fn", lambda *_, **__: engine.rewards)
        patch.setattr(Run, "export", lambda run, policy, *_: (trained.append(policy), run.close(ok=True)))
        module.main(load_config(module.Config, [*common, *options], prog=loop))
    torch.set_num_threads(threads)
    os.environ.clear()  # accelerate writes what it was asked for there
    os.environ |= environment
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()], trained[0]
