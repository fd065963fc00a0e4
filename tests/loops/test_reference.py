"""A reference that follows the policy: what an update does, and that a resumed run goes on with the same one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from configs.loader import load_config
from data.pack import pack_groups
from loops import dpo, grpo
from loops.shared.policy import score
from loops.shared.reference import Reference, build_reference
from tests.loops.test_runs import HOUSE, run
from tests.loops.test_steps import tiny_policy

BATCH = [([3, 4, 5], [[6, 7], [8, 9, 10]])]


def policy_of(kind: str):
    policy = tiny_policy()
    if kind == "lora":
        policy = get_peft_model(policy, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    return policy


def move(policy) -> None:
    """Stand-in for an optimizer step."""
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize(("ref_update", "alpha"), [("ema", 0.25), ("sync", 1.0)])
def test_a_reference_follows_by_the_weights_that_it_is_given(kind, ref_update, alpha, only_float64):
    """Steps 2 and 4 of 5 update: r <- alpha p + (1 - alpha) r, written out here; the policy and its flags stay."""
    policy = policy_of(kind)
    reference = build_reference(policy, ref_update=ref_update, mixup_alpha=0.25, sync_steps=2)
    trained = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    expected = {name: parameter.detach().clone() for name, parameter in trained.items()}
    batch = pack_groups(BATCH)
    start = reference.logprobs(batch)
    for step in range(1, 6):
        move(policy)
        before = {name: parameter.detach().clone() for name, parameter in trained.items()}
        reference.update(policy, step)
        if step % 2 == 0:
            expected = {n: alpha * trained[n].detach() + (1 - alpha) * old for n, old in expected.items()}
        assert all(torch.equal(parameter, before[name]) for name, parameter in trained.items())
        assert reference.tensors().keys() == expected.keys()
        assert all((tensor - expected[name]).abs().max() < 1e-12 for name, tensor in reference.tensors().items())
    moved = reference.logprobs(batch)
    assert (moved - start).abs().max() > 1e-3
    assert trained.keys() == {n for n, p in policy.named_parameters() if p.requires_grad}
    with torch.no_grad():  # the policy with the expected weights gives the reference's log-probabilities
        for name, parameter in trained.items():
            parameter.copy_(expected[name])
        assert (score(policy.eval(), batch).logprobs - moved).abs().max() < 1e-10


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_reference_stays_unless_it_is_asked_to_follow(kind):
    policy = policy_of(kind)
    reference, batch = build_reference(policy), pack_groups(BATCH)
    start = reference.logprobs(batch)
    move(policy)
    reference.update(policy, 512)
    assert torch.equal(reference.logprobs(batch), start) and not reference.tensors()


RUNS = {
    "dpo": ["--precompute_ref_log_probs", "false", "--max_train_samples", "32", "--learning_rate", "1e-2"],
    "grpo": ["--beta", "0.5", "--lora_r", "4", "--merge_weights", "--learning_rate", "1e-2"],
}


@pytest.mark.parametrize("loop", RUNS)
@pytest.mark.parametrize("ref_update", ["ema", "sync"])
def test_a_resumed_run_goes_on_with_the_saved_reference(loop, ref_update, tmp_path, monkeypatch):
    """Five steps in one go; three, a checkpoint, a new start, two more. Before steps 4 and 5 both runs have the same
    reference, which is not the policy that was resumed, and both end in the same bytes."""
    monkeypatch.chdir(HOUSE)
    seen: dict[tuple[str, int], dict] = {}
    update = Reference.update

    def recorded(self, policy, step):
        seen[name, step] = {key: tensor.clone() for key, tensor in self.tensors().items()}
        if step == 4:
            weights = dict(getattr(policy, "module", policy).named_parameters())
            gap = max((weights[key] - tensor).abs().max().item() for key, tensor in self.tensors().items())
            assert gap > 1e-4, "the reference was anchored to the resumed policy"
        update(self, policy, step)

    monkeypatch.setattr(Reference, "update", recorded)
    options = ["--ref_update", ref_update, "--ref_model_sync_steps", "2", "--save_steps", "3", *RUNS[loop]]
    options += ["--eval_reward", "null", "--lr_scheduler_type", "constant", "--max_eval_samples", "2"]
    for name, more in (
        ("whole", ["--max_steps", "5"]),
        ("parts", ["--max_steps", "3"]),
        ("parts", ["--max_steps", "5", "--resume_from", "latest"]),
    ):
        run(loop, tmp_path / name, *options, *more)
    for step in (4, 5):
        one, other = seen["whole", step], seen["parts", step]
        assert one and one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    whole, parts = (load_file(tmp_path / name / "model/model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


@pytest.mark.slow
@pytest.mark.parametrize("loop", RUNS)
def test_a_sharded_reference_is_saved_and_resumed(loop, tmp_path):
    """FSDP2 x 2: the same bytes after five steps in one go and after three and two."""
    environment = {**os.environ, "PYTHONPATH": str(HOUSE), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/cpu_fsdp2.yaml"]
    command += [f"loops/{loop}.py", "--config", f"configs/{loop}.yaml", "--ref_update", "ema", *RUNS[loop]]
    command += ["--ref_model_sync_steps", "2", "--save_steps", "3", "--lr_scheduler_type", "constant"]
    command += ["--per_device_train_batch_size", "8", "--eval_reward", "null", "--max_eval_samples", "2"]
    command += ["--max_completion_length", "8"]
    for name, more in (
        ("whole", ["--max_steps", "5"]),
        ("parts", ["--max_steps", "3"]),
        ("parts", ["--max_steps", "5", "--resume_from", "latest"]),
    ):
        words = [*command, *more, "--output_dir", str(tmp_path / name)]
        done = subprocess.run(words, cwd=HOUSE, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    whole, parts = (Path(tmp_path / name / "model/model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="ref_update .* precompute_ref_log_probs: false"):
        dpo.Config(ref_update="ema")
    with pytest.raises(ValueError, match="ref_update is sync and beta 0"):
        grpo.Config(ref_update="sync")
    dpo.Config(ref_update="ema", precompute_ref_log_probs=False)
    config = load_config(grpo.Config, ["--ref_update", "ema", "--beta", "0.1"], prog="grpo")
    assert (config.ref_update, config.ref_model_mixup_alpha, config.ref_model_sync_steps) == ("ema", 0.6, 512)
    for wrong in ({"ref_update": "often"}, {"mixup_alpha": 0.0}, {"mixup_alpha": 1.5}, {"sync_steps": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            build_reference(policy_of("full"), **wrong)
