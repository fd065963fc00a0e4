"""Tables of Plumbline alone, for `compare.py --scaling` and `--mfu`: what an update costs against its shapes, and on a
GPU the model FLOP/s utilisation, the fused head against bare matrix products, and the longest sequence that fits.

    python benchmarks/scaling.py '{"kind": "update", "device": "cpu", ...}'     # one point, in a process of its own

Prompts and completions are random tokens, weights are random; an update is what the loops do in a step.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent


def qwen3(hidden, inner, layers, heads, key_heads, vocabulary=151_936, head_size=128, tied=True) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": head_size,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 1 << 20,
    }


SHAPES = {
    "tiny": qwen3(64, 192, 2, 2, 1, vocabulary=49_152, head_size=32),  # to try the scripts out
    "30m": qwen3(384, 1024, 8, 6, 2, vocabulary=49_152, head_size=64),
    "qwen3-0.6b": qwen3(1024, 3072, 28, 16, 8),
    "qwen3-1.7b": qwen3(2048, 6144, 28, 16, 8),
    "qwen3-8b": qwen3(4096, 12_288, 36, 32, 8, tied=False),
}
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12}  # dense bf16, by what the device's name contains
CAPTION = (
    "FLOPs of a step = c N T + c V H K + 12 L d P: N weights of the layers' matrices, T tokens, c = 6 for full "
    "training and 4 for LoRA (adapters add 6 a weight and token), V H the head on K trained tokens, L layers, d width "
    "of all query heads, P pairs of a token and one that it attends to. Nothing that is computed twice counts twice. "
    "MFU is that over seconds and the device's peak of dense bf16."
)


# One point, in its own process


def build_policy(shape: dict[str, Any], *, device: str, dtype: str, lora_r: int, checkpointing: bool):
    """A Qwen3 with random weights drawn on the device itself, prepared for packing."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    from loops.shared.policy import enable_packing

    torch.manual_seed(0)
    with torch.device(device):
        policy = AutoModelForCausalLM.from_config(Qwen3Config(**shape), dtype=getattr(torch, dtype))
    if lora_r:
        from peft import LoraConfig, get_peft_model

        policy = get_peft_model(policy, LoraConfig(r=lora_r, lora_alpha=2 * lora_r, target_modules="all-linear"))
    if checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    enable_packing(policy)
    return policy.train()


def trainer_of(policy, device: str):
    """(policy, optimizer, scheduler, accelerator) as the loops make them."""
    from accelerate import Accelerator

    from loops.shared.optim import OptimConfig, build_optimizer, build_schedule

    accelerator = Accelerator(cpu=device == "cpu", mixed_precision="no" if device == "cpu" else "bf16")
    optimizer = build_optimizer(policy, OptimConfig())
    scheduler = build_schedule(optimizer, OptimConfig(), 1000)
    policy, optimizer = accelerator.prepare(policy, optimizer)
    return policy, optimizer, scheduler, accelerator


def seconds_of(step, device: str, warmups: int = 1, repeats: int = 3) -> float:
    """Median seconds of `step()`."""
    import torch

    seconds = []
    for number in range(warmups + repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        if number >= warmups:
            seconds.append(time.perf_counter() - began)
    return median(seconds)


def update(policy, optimizer, scheduler, accelerator, batch, loss_of) -> None:
    """One optimizer step on one packed batch."""
    from loops.shared.optim import clip_gradients
    from loops.shared.policy import score

    accelerator.backward(loss_of(score(policy, batch).logprobs))
    clip_gradients(accelerator, policy, 1.0)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()


def measure_update(settings: dict[str, Any]) -> dict[str, float]:
    """One GRPO update on `prompts` groups of `generations` completions."""
    import torch

    from data.pack import pack_groups
    from losses.grpo import grpo_loss

    device, vocabulary = settings["device"], settings["shape"]["vocab_size"]
    policy = build_policy(settings["shape"], device=device, dtype="float32", lora_r=0, checkpointing=False)
    policy, *rest, accelerator = trainer_of(policy, device)
    draw = lambda length: torch.randint(vocabulary, (length,)).tolist()  # noqa: E731
    groups = [
        (draw(settings["prompt"]), [draw(settings["completion"]) for _ in range(settings["generations"])])
        for _ in range(settings["prompts"])
    ]
    batch = pack_groups(groups).to(device)
    advantages, tokens = torch.randn(len(batch.mask), device=device), int(batch.mask.sum())
    loss_of = lambda logprobs: grpo_loss(logprobs, logprobs.detach(), advantages, batch.mask)[0] / tokens  # noqa: E731
    seconds = seconds_of(lambda: update(policy, *rest, accelerator, batch, loss_of), device)
    return {"seconds": seconds, "computed": batch.num_tokens, "trained": tokens}


def measure_training(settings: dict[str, Any]) -> dict[str, float]:
    """SFT steps on `sequences` sequences of `length` tokens, all trained: seconds and FLOPs."""
    device = settings["device"]
    names = ("dtype", "lora_r", "checkpointing")
    policy = build_policy(settings["shape"], device=device, **{name: settings[name] for name in names})
    adapters = sum(p.numel() for p in policy.parameters() if p.requires_grad) if settings["lora_r"] else 0
    policy, *rest, accelerator = trainer_of(policy, device)
    batch = random_examples(settings["sequences"], settings["length"], settings["shape"]["vocab_size"]).to(device)
    loss_of = lambda logprobs: -logprobs.sum() / len(batch.targets)  # noqa: E731
    seconds = seconds_of(lambda: update(policy, *rest, accelerator, batch, loss_of), device, 2, 5)
    flops = flops_of(settings["shape"], settings["sequences"], settings["length"], settings["lora_r"], adapters)
    return {"seconds": seconds, "tokens": batch.num_tokens, "flops": flops, "device_peak": device_peak(device)}


def measure_longest(settings: dict[str, Any]) -> dict[str, float]:
    """The longest single sequence, doubling from `length` up to `limit`, that one SFT step has memory for."""
    import torch

    names = ("dtype", "lora_r", "checkpointing")
    policy = build_policy(settings["shape"], device=settings["device"], **{name: settings[name] for name in names})
    policy, *rest, accelerator = trainer_of(policy, settings["device"])
    length, longest = settings["length"], 0
    while length <= settings["limit"]:
        batch = random_examples(1, length, settings["shape"]["vocab_size"]).to(settings["device"])
        try:
            update(policy, *rest, accelerator, batch, lambda logprobs: -logprobs.sum())
        except torch.OutOfMemoryError:
            break
        longest, length = length, 2 * length
    return {"longest": longest}


def measure_head(settings: dict[str, Any]) -> dict[str, float]:
    """`token_logprobs`, forward and backward, over the three matrix products that it cannot do without."""
    import torch

    from losses.logprobs import token_logprobs

    device, tokens = settings["device"], settings["tokens"]
    shape, dtype = settings["shape"], getattr(torch, settings["dtype"])
    hidden = torch.randn(tokens, shape["hidden_size"], device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(shape["vocab_size"], shape["hidden_size"], device=device, dtype=dtype).mul_(0.02)
    weight.requires_grad_()
    targets = torch.randint(shape["vocab_size"], (tokens,), device=device)
    logits = torch.empty(tokens, shape["vocab_size"], device=device, dtype=dtype)

    def fused():
        hidden.grad = weight.grad = None
        token_logprobs(hidden, weight, targets)[0].sum().backward()

    @torch.no_grad()
    def bare():
        torch.mm(hidden, weight.t(), out=logits)  # the logits
        torch.mm(logits, weight)  # the gradient of hidden
        torch.mm(logits.t(), hidden)  # the gradient of the weight

    return {"fused": seconds_of(fused, device, 2, 5), "bare": seconds_of(bare, device, 2, 5)}


def random_examples(count: int, length: int, vocabulary: int):
    """A packed batch of random sequences of which every token but the first is trained."""
    import torch

    from data.chat import Example
    from data.pack import pack_examples

    is_target = [False] + [True] * (length - 1)
    return pack_examples([Example(torch.randint(vocabulary, (length,)).tolist(), is_target) for _ in range(count)])


def flops_of(shape: dict[str, Any], sequences: int, length: int, lora_r: int, adapters: int) -> float:
    """CAPTION's formula."""
    hidden, layers = shape["hidden_size"], shape["num_hidden_layers"]
    width = shape["num_attention_heads"] * shape["head_dim"]
    key_width = shape["num_key_value_heads"] * shape["head_dim"]
    weights = layers * (hidden * (2 * width + 2 * key_width) + 3 * hidden * shape["intermediate_size"])
    factor, tokens = (4 if lora_r else 6), sequences * length
    head = shape["vocab_size"] * hidden * sequences * (length - 1)
    pairs = sequences * length * (length + 1) / 2
    return factor * (weights * tokens + head) + 6 * adapters * tokens + 12 * layers * width * pairs


def device_peak(device: str) -> float:
    """Peak FLOP/s, NaN for a device that is not in the table."""
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else ""
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), float("nan"))


MEASURES = {"update": measure_update, "training": measure_training, "longest": measure_longest, "head": measure_head}


# Tables, from points


def run_point(settings: dict[str, Any]) -> dict[str, float] | None:
    """One point in its own process; None where it ran out of memory."""
    variables = {**os.environ, "PYTHONPATH": str(HERE.parent), "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    if settings["device"] == "cpu":
        variables |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(settings["threads"])}
    command = [sys.executable, str(HERE / "scaling.py"), json.dumps(settings)]
    done = subprocess.run(command, cwd=HERE.parent, env=variables, capture_output=True, text=True)
    if done.returncode and "OutOfMemoryError" in done.stderr:
        return None
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    print(settings["kind"], {k: v for k, v in settings.items() if k != "shape"}, done.stdout.strip(), flush=True)
    return json.loads(done.stdout.splitlines()[-1])


def scaling_table(options) -> str:
    """GRPO update of 4 prompts of 256 tokens x 8 completions of 128, one of its shapes changed at a time."""
    name = options.shape or "30m"
    base = {"prompts": 4, "prompt": 256, "completion": 128, "generations": 8, "vocabulary": None}
    changes = [("prompt", (1024, 2048)), ("completion", (256, 512)), ("generations", (2, 4, 16))]
    changes += [("vocabulary", (8192, 151_936))]
    points = [("base", base)] + [(f"{key} {v:,}", base | {key: v}) for key, values in changes for v in values]
    lines = [
        f"GRPO update, {name} shape, fp32 weights, 4 prompts of 256 tokens x 8 completions of 128, but for:",
        "",
        "| change | tokens computed | tokens trained | seconds | microseconds a computed token | peak GiB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for label, point in points:
        shape = SHAPES[name] | ({"vocab_size": point["vocabulary"]} if point["vocabulary"] else {})
        settings = {"kind": "update", "device": options.device, "threads": options.threads, **point, "shape": shape}
        got = run_point(settings)
        if got is None:
            lines.append(f"| {label} | out of memory | | | | |")
            continue
        each = got["seconds"] / got["computed"] * 1e6
        cells = f"{got['computed']:,} | {got['trained']:,} | {got['seconds']:.3f} | {each:.1f}"
        lines.append(f"| {label} | {cells} | {got['peak'] / 2**30:.2f} |")
    return "\n".join(lines)


def mfu_table(options) -> str:
    """Training steps of 8,192 tokens at Qwen3's shapes, the longest sequence that fits, and the fused head."""
    ways = [("full, fp32 weights", "float32", 0), ("full, bf16 weights", "bfloat16", 0), ("LoRA r=16", "bfloat16", 16)]
    common = {"device": options.device, "threads": options.threads, "checkpointing": options.gradient_checkpointing}
    lines = [
        f"SFT steps of 4 x 2,048 tokens in bf16. {CAPTION}",
        "",
        "| shape | weights | seconds | tokens a second | MFU | peak GiB | longest sequence that fits |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    shapes = [options.shape] if options.shape else list(SHAPES)[2:]
    for name in shapes:
        for label, dtype, lora_r in ways:
            way = common | {"shape": SHAPES[name], "dtype": dtype, "lora_r": lora_r}
            got = run_point({**way, "kind": "training", "sequences": 4, "length": 2048})
            if got is None:
                lines.append(f"| {name} | {label} | out of memory | | | | |")
                continue
            speed = f"{got['seconds']:.3f} | {got['tokens'] / got['seconds']:,.0f}"
            mfu = f"{got['flops'] / got['seconds'] / got['device_peak']:.1%}"
            fits = ""
            if options.device == "cuda":
                reached = run_point({**way, "kind": "longest", "length": 8192, "limit": 262_144}) or {"longest": 0}
                fits = f"{reached['longest']:,}" + (" (limit)" if reached["longest"] == 262_144 else "")
            lines.append(f"| {name} | {label} | {speed} | {mfu} | {got['peak'] / 2**30:.1f} | {fits} |")
    lines += [
        "",
        "Fused head (log-probabilities and entropies, forward and backward) of 8,192 tokens against three products:",
        "",
        "| shape | dtype | fused, ms | bare products, ms | fused / bare | peak GiB (of both) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in shapes:
        dtype = "bfloat16" if options.device == "cuda" else "float32"
        settings = common | {"kind": "head", "shape": SHAPES[name], "dtype": dtype, "tokens": 8192}
        got = run_point(settings)
        if got is None:
            lines.append(f"| {name} | {dtype} | out of memory | | | |")
            continue
        times = f"{got['fused'] * 1e3:.1f} | {got['bare'] * 1e3:.1f} | {got['fused'] / got['bare']:.2f}"
        lines.append(f"| {name} | {dtype} | {times} | {got['peak'] / 2**30:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    from child import peak_bytes, use_cores

    point = json.loads(sys.argv[1])
    use_cores(point["threads"] if point["device"] == "cpu" else 0)
    result = MEASURES[point["kind"]](point)
    print(json.dumps(result | {"peak": peak_bytes()}))
