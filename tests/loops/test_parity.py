"""Twenty steps of each loop end the same on one process, DDP, FSDP2 and hybrid shards: real processes over gloo."""

import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from data.batches import BatchConfig, rows_of_step, share_of_rank
from data.chat import Example, Pair, Prompt
from loops import dpo, grpo, sft
from loops.shared.failures import FiniteGuard
from loops.shared.models import build_reference
from loops.shared.optim import OptimConfig, build_optimizer, build_schedule
from loops.shared.policy import enable_packing
from loops.shared.rollout import Completion, RolloutConfig
from loops.shared.run import reduce_sums
from loops.shared.sharding import build_accelerator, local_elements, prepare, read_sharding
from losses.grpo import group_advantages, loss_denominator
from tests.conftest import make_float32_mean_float64

LOOPS = {"sft": sft, "dpo": dpo, "grpo": grpo}
KINDS = ("full", "lora")
STEPS = 20
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


def step_rows(step):
    """Seven rows, five a step: steps of five and of two rows (fewer than four processes); at the end a data set of
    three rows, smaller than a step."""
    few = step >= 16
    return rows_of_step(step - 16 * few, num_rows=3 if few else 7, rows_per_step=5, seed=1)


def train(loop, kind, accelerator, sharding):
    """(losses, gradient norms, elements held here, trained weights, whole and by name) of STEPS steps."""
    torch.manual_seed(0)
    shape = dict(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    policy = Qwen3ForCausalLM(Qwen3Config(**shape, num_key_value_heads=2, head_dim=16, initializer_range=0.1))
    policy = policy.to(torch.float32)  # which the exact tests make float64
    if kind == "lora":
        policy = get_peft_model(policy, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    enable_packing(policy)
    settings = {"grpo": {"beta": 0.1, "rollout": RolloutConfig(num_generations=4, max_completion_length=20)}}
    config = LOOPS[loop].Config(
        batch=BatchConfig(per_device_train_batch_size=3),
        optim=OptimConfig(learning_rate=1e-3, max_grad_norm=1.0),
        **settings.get(loop, {}),
    )
    reference = None if loop == "sft" else build_reference(policy)
    optimizer = build_optimizer(policy, config.optim)
    scheduler = build_schedule(optimizer, config.optim, STEPS)
    policy, optimizer = prepare(accelerator, policy, optimizer, reference=reference, sharding=sharding)
    g = torch.Generator().manual_seed(3)
    examples = [Example(ids, [True] * len(ids)) for ids in (tokens(g, 2, 30) for _ in range(7))]
    pairs = [Pair(tokens(g, 1, 9), tokens(g, 1, 20), tokens(g, 1, 20)) for _ in range(7)]
    prompts = [Prompt(tokens(g, 1, 9), "", {}) for _ in range(7)]
    losses, norms = [], []
    for step in range(STEPS):
        rows = step_rows(step)
        common = (optimizer, scheduler)
        if loop == "sft":
            micro = sft.build_microbatches(rows, [[e] for e in examples], config, accelerator)
            count = sum(len(examples[row].input_ids) - 1 for row in rows)
            sums = sft.train_step(policy, *common, micro, count, config, accelerator, True, FiniteGuard(accelerator))
            losses.append(reduce_sums(accelerator, sums)["loss/sft"] / count)
        elif loop == "dpo":
            micro = dpo.build_microbatches(rows, pairs, None, config, accelerator)
            sums = dpo.train_step(
                policy, reference, *common, micro, len(rows), config, accelerator, True, FiniteGuard(accelerator)
            )
            losses.append(reduce_sums(accelerator, sums)["loss/dpo"] / len(rows))
        else:  # recorded rollouts: completions and rewards of a step depend on the step alone
            g = torch.Generator().manual_seed(100 + step)
            answers = [[Completion(tokens(g, 1, 20), [], "stop", "", 0) for _ in range(4)] for _ in rows]
            rewards = torch.rand(len(rows) * 4, generator=g, dtype=torch.float64)
            advantages = group_advantages(rewards, 4)
            lengths = [len(prompts[row].prompt_ids) for row in rows]
            share = share_of_rank(lengths, rank=accelerator.process_index, num_processes=accelerator.num_processes)
            own = [
                Completion(c.token_ids, [-4.5] * len(c.token_ids), "stop", "", 0)
                for place in share
                for c in answers[place]
            ]
            mine = advantages.view(-1, 4)[share].flatten()
            micro = grpo.build_microbatches([prompts[rows[p]] for p in share], own, mine, config, accelerator)
            count = sum(len(c.token_ids) for group in answers for c in group)
            down = loss_denominator("dapo", num_tokens=count, num_sequences=len(rewards), max_completion_length=20)
            sums, _ = grpo.train_step(
                policy, reference, *common, micro, down, config, accelerator, True, FiniteGuard(accelerator)
            )
            losses.append(reduce_sums(accelerator, sums)["loss/policy"])
        norms.append(float(sums["optim/grad_norm"]))
    held = local_elements(policy)
    weights = {}
    for name, parameter in accelerator.unwrap_model(policy).named_parameters():
        if parameter.requires_grad:
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            weights[name] = whole.detach().clone().contiguous()
    return losses, norms, held, weights


def on_one_topology(name, folder, exact):
    torch.set_num_threads(1)
    if exact:
        make_float32_mean_float64()
    processes, fsdp = TOPOLOGIES[name]
    sharding = read_sharding(fsdp, {}, False)
    accelerator = build_accelerator(sharding, precision="no", on_cpu=True, processes=processes, per_machine=processes)
    assert accelerator.num_processes == processes
    numbers, weights = {}, {}
    for loop in LOOPS:
        for kind in KINDS:
            losses, norms, held, trained = train(loop, kind, accelerator, sharding)
            numbers[f"{loop}-{kind}"] = {"losses": losses, "norms": norms, "held": held}
            weights |= {f"{loop}-{kind}/{name}": tensor for name, tensor in trained.items()}
            accelerator.free_memory()
    if accelerator.is_main_process:
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
