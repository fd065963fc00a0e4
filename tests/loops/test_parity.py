"""Twenty steps of each loop end the same on one process, DDP, FSDP2 and hybrid shards: real processes over gloo."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from data.chat import Example, Pair, Prompt
from loops.shared.policy import enable_packing
from loops.shared.sharding import local_elements
from tests.conftest import make_float32_mean_float64
from tests.loops.loop_runs import LOOPS, RecordedEngine, run_loop

KINDS = ("full", "lora")
TOPOLOGIES = {  # name -> (processes, fsdp)
    "one": (1, ""),
    "ddp2": (2, ""),
    "fsdp2": (2, "full_shard"),
    "fsdp4": (4, {"reshard_after_forward": True, "forward_prefetch": True}),
    "hybrid": (4, {"dp_replicate_size": 2}),
}


def tokens(generator, low, high):
    count = int(torch.randint(low, high, (1,), generator=generator))
    return torch.randint(3, 96, (count,), generator=generator).tolist()


def make_policy(kind):
    torch.manual_seed(0)
    shape = dict(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    policy = Qwen3ForCausalLM(Qwen3Config(**shape, num_key_value_heads=2, head_dim=16, initializer_range=0.1))
    policy = policy.to(torch.float32)  # which the exact tests make float64
    if kind == "lora":
        policy = get_peft_model(policy, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    enable_packing(policy)
    return policy


def recorded_step(step):
    """Completions and rewards of a step's five or fewer prompts; they depend on the step alone."""
    g = torch.Generator().manual_seed(100 + step)
    groups = [[tokens(g, 1, 20) for _ in range(4)] for _ in range(5)]
    return groups, torch.rand(5, 4, generator=g, dtype=torch.float64).tolist()


def train(loop, kind, fsdp, folder):
    """(losses, gradient norms, elements held here, trained weights, whole and by name) of twenty steps.

    Sixteen steps of five and of two rows out of seven (fewer than four processes); then four on a data set of three
    rows, smaller than a step.
    """
    g = torch.Generator().manual_seed(3)
    if loop == "sft":
        rows = [Example(ids, [True] * len(ids)) for ids in (tokens(g, 2, 30) for _ in range(7))]
    elif loop == "dpo":
        rows = [Pair(tokens(g, 1, 9), tokens(g, 1, 20), tokens(g, 1, 20)) for _ in range(7)]
    else:
        rows = [Prompt(tokens(g, 1, 9), "", {}) for _ in range(7)]
    common = ["--per_device_train_batch_size", "3", "--train_batch_size", "5", "--learning_rate", "1e-3"]
    common += ["--warmup_steps", "0", "--max_grad_norm", "1.0"]
    common += ["--fsdp", fsdp if isinstance(fsdp, str) else json.dumps(fsdp)]
    common += {"sft": [], "dpo": ["--precompute_ref_log_probs", "false"], "grpo": ["--beta", "0.1"]}[loop]
    if loop == "grpo":
        common += ["--num_generations", "4", "--max_completion_length", "20", "--prompts_per_step", "5"]
        common += ["--max_mismatch", "1e9"]  # the recorded log-probabilities are made up
    metrics, weights, held = [], {}, 0
    for part, (count, steps) in enumerate([(7, 16), (3, 4)]):
        engine = RecordedEngine(lambda step: recorded_step(step)[0], lambda step: recorded_step(step)[1])
        found, policy = run_loop(
            loop,
            folder / f"{loop}-{kind}-{part}",
            rows[:count],
            *common,
            *("--max_steps", str(steps)),
            policy=make_policy(kind),
            engine=engine,
            build_optimizer=None,
        )
        metrics += found
        held = local_elements(policy)
        while hasattr(policy, "module"):
            policy = policy.module
        for name, parameter in policy.named_parameters():
            if parameter.requires_grad:
                whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
                weights[f"{part}/{name}"] = whole.detach().clone().contiguous()
    loss = {"sft": "loss/sft", "dpo": "loss/dpo", "grpo": "loss/policy"}[loop]
    return [row[loss] for row in metrics], [row["optim/grad_norm"] for row in metrics], held, weights


def on_one_topology(name, folder, exact):
    torch.set_num_threads(1)
    if exact:
        make_float32_mean_float64()
    numbers, weights = {}, {}
    for loop in LOOPS:
        for kind in KINDS:
            losses, norms, held, trained = train(loop, kind, TOPOLOGIES[name][1], Path(folder) / name)
            numbers[f"{loop}-{kind}"] = {"losses": losses, "norms": norms, "held": held}
            weights |= {f"{loop}-{kind}/{name}": tensor for name, tensor in trained.items()}
    if TOPOLOGIES[name][0] == 1 or torch.distributed.get_rank() == 0:
        save_file(weights, f"{folder}/{name}.safetensors")
        with open(f"{folder}/{name}.json", "w") as file:
            json.dump(numbers, file)


def start(name, folder, exact):
    code = (
        "from accelerate import debug_launcher; from tests.loops.test_parity import on_one_topology;"
        f"debug_launcher(on_one_topology, ({name!r}, {str(folder)!r}, {exact}), num_processes={TOPOLOGIES[name][0]})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / f"{name}.json").read_text()), load_file(folder / f"{name}.safetensors")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The measure of all: one process, in float64."""
    return start("one", tmp_path_factory.mktemp("one"), True)


def differences(a, b):
    """Largest differences of a loss, a gradient norm and a weight."""
    losses = max(abs(x - y) for key in a[0] for x, y in zip(a[0][key]["losses"], b[0][key]["losses"], strict=True))
    norms = max(abs(x - y) for key in a[0] for x, y in zip(a[0][key]["norms"], b[0][key]["norms"], strict=True))
    assert a[1].keys() == b[1].keys()
    return losses, norms, max((a[1][name] - b[1][name]).abs().max().item() for name in a[1])


FOUR = [pytest.param(name, marks=pytest.mark.slow) for name in ("hybrid", "fsdp4")]


@pytest.mark.parametrize("name", ["ddp2", "fsdp2", *FOUR])
def test_every_topology_takes_the_same_twenty_steps(name, tmp_path, one_process):
    """SFT, DPO and GRPO, full and LoRA, float64: losses, gradient norms and weights within 1e-12 of one process."""
    other = start(name, tmp_path, True)
    assert max(differences(one_process, other)) < 1e-12
    processes, fsdp = TOPOLOGIES[name]
    shards = processes // (2 if name == "hybrid" else 1) if fsdp else 1
    for key, numbers in other[0].items():
        whole = one_process[0][key]["held"]
        assert numbers["held"] == pytest.approx(whole / shards, rel=0.01), key  # halves from 1 to 2 to 4
        assert max(numbers["losses"]) - min(numbers["losses"]) > 1e-3  # the run went somewhere


@pytest.mark.slow
def test_single_precision_stays_close(tmp_path, one_process):
    """The same in float32 under FSDP2, within 1e-4 of one process in float64."""
    gaps = differences(one_process, start("fsdp2", tmp_path, False))
    print(gaps)
    assert max(gaps) < 1e-4
