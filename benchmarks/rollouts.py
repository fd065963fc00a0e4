"""Whole runs of GRPO with every rollout engine: do they learn alike, what does overlap save, what do kills cost?

    python benchmarks/rollouts.py learn --seeds 42 43 44      # quickstart, every set-up: accuracy and reward curves
    python benchmarks/rollouts.py syncs --syncs 100           # how exactly is each synced policy served?
    python benchmarks/rollouts.py overlap                     # async_level 1 against 0, a core for each side
    python benchmarks/rollouts.py kills --kills 50            # a run whose servers are killed all the time
    python benchmarks/rollouts.py speed                       # sampling and syncs of a 30M model, engine by engine

For a CPU with vLLM (`launch/install_vllm_cpu.sh`). Every run is a process of its own that is kept on its cores, one at
a time; its numbers come from its metrics.jsonl. Prints a table as Markdown. The exit status is 1 where a run did not do
what is claimed of it (accuracy, completions, log-probabilities); times are only printed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

from benchmarks.child import use_cores  # noqa: E402
from benchmarks.compare import (  # noqa: E402
    SHARED,
    chat_text,
    evenly,
    heading,
    read_rows,
    two_shot_prompts,
    write_model,
    write_rows,
)
from benchmarks.scaling import SHAPES  # noqa: E402

MODEL = ROOT / "data/quickstart/model"
ACCURACY = 0.95
MISMATCH = 2e-5  # nats, float32
WINDOW = 10  # steps over which reward curves are averaged before they are compared
LORA = ["--lora_r", "32", "--lora_alpha", "64", "--learning_rate", "2e-3", "--min_learning_rate", "2e-4"]
SETUPS = {
    "transformers": ["--engine", "transformers"],
    "vllm": ["--engine", "vllm"],
    "vllm-server, full sync": ["--engine", "vllm-server", "--weight_sync", "full"],
    "transformers, adapter": ["--engine", "transformers", *LORA],
    "vllm-server, adapter sync": ["--engine", "vllm-server", "--weight_sync", "adapter", *LORA],
}
ADAPTED = {"lora_r": 4, "lora_alpha": 8.0}
QUANTISED = ADAPTED | {"load_in_4bit": True}
SYNCED = {  # (engine, weight_sync, settings of the model)
    "all weights, vllm": ("vllm", "full", {"lora_r": 0}),
    "all weights, vllm-server over gloo": ("vllm-server", "full", {"lora_r": 0}),
    "LoRA merged on the way, vllm": ("vllm", "full", ADAPTED),
    "LoRA merged on the way, vllm-server over gloo": ("vllm-server", "full", ADAPTED),
    "LoRA adapter, vllm": ("vllm", "adapter", ADAPTED),
    "LoRA adapter, vllm-server": ("vllm-server", "adapter", ADAPTED),
    "QLoRA adapter, vllm": ("vllm", "adapter", QUANTISED),
    "QLoRA dequantised and merged, vllm": ("vllm", "full", QUANTISED),
}
JOB = """  # argument: elements of a weight; each round is a product with 64 tokens and an update in place
import sys, time, torch
weight, x = torch.ones(int(sys.argv[1]) // 1024, 1024), torch.ones(64, 1024)
for rounds in (2, int(1e9) // weight.numel()):  # the first warm up
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.perf_counter()
    for _ in range(rounds):
        x @ weight.T
        weight.mul_(0.999)
print(time.perf_counter() - began)
"""
QUICKSTART = ["--config", "configs/grpo.yaml", "--log_completions_steps", "0"]
SERVER = "vllm.entrypoints.openai.api_server"

Rows = list[dict[str, Any]]


# ---- runs ------------------------------------------------------------------------------------------------------------


def environment(threads: int) -> dict[str, str]:
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **quiet, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}


def run(
    folder: Path, options: Sequence[str], cores: int, meanwhile: Callable[[subprocess.Popen], None] | None = None
) -> Rows:
    """A run of loops/grpo.py on the first `cores` cores; the rows of its metrics, row 0 from before training.

    meanwhile: called with the process once it has started; without it the run's servers stay on the same cores.

    Raises:
        SystemExit: the run failed; the end of what it printed.
    """
    folder.mkdir(parents=True)
    command = [sys.executable, str(HERE / "child.py"), str(folder / "seen"), str(cores)]
    command += [str(ROOT / "loops/grpo.py"), *options, "--output_dir", str(folder / "run")]
    log = folder / "log"
    with log.open("w") as output:
        child = subprocess.Popen(command, cwd=ROOT, env=environment(cores), stdout=output, stderr=subprocess.STDOUT)
        try:
            if meanwhile is not None:
                meanwhile(child)
            code = child.wait()
        finally:
            child.kill()
    if code:
        raise SystemExit(f"{shlex.join(command)} ended with {code}:\n{log.read_text(errors='replace')[-4000:]}")
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


def accuracy(rows: Rows) -> float:
    return [row["eval/accuracy"] for row in rows if row.get("eval/accuracy") is not None][-1]


def middle(rows: Rows, name: str) -> float:
    """Median over the steps after the first two, which warm up and, ahead, fill the queue."""
    return median(row[name] for row in rows[3:])


def completions(row: dict[str, Any]) -> int:
    """Completions that a step was trained on."""
    return round(row["rollout/completions"])


def servers_of(process: int) -> dict[int, str]:
    """Server processes that a process has started, itself or by others: their command lines by process id."""
    parents, commands = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            commands[int(folder.name)] = (folder / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
        except (OSError, IndexError):  # it has ended meanwhile
            continue
    found = {}
    for number, command in commands.items():
        ancestor = number
        while ancestor in parents and ancestor != process:
            ancestor = parents[ancestor]
        if ancestor == process and number != process and ("vllm_server.py" in command or SERVER in command):
            found[number] = command
    return found


def move(process: int, core: int) -> None:
    """Put all threads of a process on a core; what it starts later follows."""
    for thread in list(Path(f"/proc/{process}/task").glob("*")):
        try:
            os.sched_setaffinity(int(thread.name), {core})
        except OSError:  # the thread has ended
            continue


def serves(command: str) -> bool:
    """Whether somebody listens on the port of a server's command line."""
    port = int(command.split("--port=")[1].split()[0])
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def beside(child: subprocess.Popen) -> None:
    """Until a run ends: its servers on the last core, while the run itself has the first."""
    moved: set[int] = set()
    last = max(os.sched_getaffinity(0))
    while child.poll() is None:
        for process in servers_of(child.pid).keys() - moved:
            move(process, last)
            moved.add(process)
        time.sleep(0.1 if len(moved) < 2 else 2.0)


# ---- the tables ------------------------------------------------------------------------------------------------------


def learn(options: argparse.Namespace, folder: Path) -> tuple[list[str], bool]:
    """Final accuracy of each set-up and seed, and how far apart the reward curves are."""
    lines = ["| set-up | accuracy of seeds " + " ".join(map(str, options.seeds)) + " | mean | seconds a step | sync |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    curves: dict[str, list[list[float]]] = {}
    fine = True
    for setup in options.setups:
        finals, curves[setup], times, syncs = [], [], [], []
        for seed in options.seeds:
            extra = ["--seed", str(seed), "--max_steps", str(options.steps)]
            place = folder / f"{list(SETUPS).index(setup)}-{seed}"
            rows = run(place, [*QUICKSTART, *SETUPS[setup], *extra, *options.more], options.cores)
            finals.append(accuracy(rows))
            curves[setup].append(smooth([row["reward/mean"] for row in rows[1:]]))
            times.append(middle(rows, "time/step"))
            syncs.append(middle(rows, "time/sync"))
            print(f"{setup}, seed {seed}: {accuracy(rows):.4f}", " ".join(f"{x:.2f}" for x in curves[setup][-1]))
        fine &= min(finals) >= ACCURACY
        shown = " ".join(f"{value:.3f}" for value in finals)
        cells = f"{shown} | **{mean(finals):.3f}** | {median(times):.3g} s | {1e3 * median(syncs):.3g} ms"
        lines.append(f"| {setup} | {cells} |")
    for what in ("all weights", "adapters"):
        alike = [setup for setup in options.setups if ("adapter" in setup) == (what == "adapters")]
        if len(alike) < 2:
            continue
        means = {setup: [mean(values) for values in zip(*curves[setup], strict=True)] for setup in alike}
        between = max(apart(means[a], means[b]) for a in alike for b in alike)
        lines += ["", f"Reward, mean of every {WINDOW} steps: curves of the set-ups that train {what} are "]
        lines[-1] += f"{between:.3f} apart at most (means over seeds)"
        if len(options.seeds) > 1:
            within = max(apart(a, b) for setup in alike for a in curves[setup] for b in curves[setup])
            lines[-1] += f"; two seeds of one set-up {within:.3f}"
            fine &= between <= within
        lines[-1] += "."
    return lines, fine


def smooth(curve: list[float]) -> list[float]:
    return [mean(curve[start : start + WINDOW]) for start in range(0, len(curve), WINDOW)]


def apart(first: list[float], second: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


def overlap(options: argparse.Namespace, folder: Path) -> tuple[list[str], bool]:
    """Seconds a step at async_level 0 and 1, A B A B; then whether the quickstart learns at level 1."""
    common = [*QUICKSTART, "--engine", "vllm-server", "--max_steps", str(options.steps + 2)]
    model = MODEL
    if options.workload == "gsm8k":
        model, rows_file = gsm8k(options, folder)
        common += ["--model_id", str(model), "--dataset_name", rows_file, "--eval_dataset_name", "null"]
        common += ["--reward_functions", "benchmarks.reward:fingerprint", "--learning_rate", "1e-5"]
        common += ["--per_device_train_batch_size", str(options.prompts * options.generations)]
        common += ["--num_generations", str(options.generations)]
        common += ["--max_completion_length", str(options.completion_tokens)]
    lines = ["| | level 0 | level 1 | level 1 / level 0 | in each pair |", "| --- | --- | --- | --- | --- |"]
    arms: dict[int, list[dict[str, float]]] = {0: [], 1: []}
    names = ("time/step", "time/rollout", "time/update", "time/sync")
    fine = True
    for pair in range(options.pairs):
        for level in (0, 1):
            place = folder / f"overlap-{pair}-{level}"
            rows = run(place, [*common, "--async_level", str(level), *options.more], 1, beside)
            arms[level].append({name: middle(rows, name) for name in names})
            fine &= all("policy/sampler_weight" in row and "policy/mismatch_kl" in row for row in rows[1:])
            print(f"pair {pair + 1}, level {level}:", " ".join(f"{k} {v:.3f}" for k, v in arms[level][-1].items()))
    for name in names if options.pairs else ():
        medians = [median(result[name] for result in arms[level]) for level in (0, 1)]
        ratios = [b[name] / a[name] for a, b in zip(arms[0], arms[1], strict=True)]
        shown = " ".join(f"{ratio:.3f}" for ratio in ratios)
        lines.append(f"| {name} | {medians[0]:.3f} s | {medians[1]:.3f} s | **{median(ratios):.3f}** | {shown} |")
    lines += ["", two_at_once(model)]
    if options.learn_steps:
        extra = ["--engine", "vllm-server", "--async_level", "1", "--max_steps", str(options.learn_steps)]
        rows = run(folder / "learns", [*QUICKSTART, *extra], 1, beside)
        weights = [row["policy/sampler_weight"] for row in rows[1:]]
        gaps = max(row["policy/mismatch_kl"] for row in rows[1:])
        lines += ["", f"Quickstart at level 1: accuracy {accuracy(rows):.3f} after {len(rows) - 1} steps, largest "]
        lines[-1] += f"policy/mismatch_kl {gaps:.2g}, policy/sampler_weight {min(weights):.3f} to {max(weights):.3f}."
        fine &= accuracy(rows) >= ACCURACY
    return lines, fine


def two_at_once(model: Path) -> str:
    """What the machine allows: a job on the first core by itself, and while the same job runs on the last."""
    elements = (model / "model.safetensors").stat().st_size // 4

    def seconds(cores: Sequence[int]) -> float:
        command = [sys.executable, "-c", JOB, str(elements)]
        options: dict[str, Any] = {"env": environment(1), "stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        jobs = [subprocess.Popen(command, text=True, **options) for _ in cores]
        for job, core in zip(jobs, cores, strict=True):
            job.stdout.readline()
            move(job.pid, core)
        for _ in range(2):
            for job in jobs:
                job.stdin.write("\n")
                job.stdin.flush()
            answers = [job.stdout.readline() for job in jobs]
        for job in jobs:
            job.communicate()
        return max(map(float, answers))

    cores = sorted(os.sched_getaffinity(0))
    rounds = [(seconds(cores[:1]), seconds([cores[0], cores[-1]])) for _ in range(3)]
    ratio = median(both / one for one, both in rounds)
    return (
        f"The machine itself (products with, and updates of, {elements:,} fp32 numbers, one thread): two jobs at once "
        f"take {ratio:.2f} times as long as one, so level 1 / level 0 cannot fall below {max(ratio, 1) / 2:.2f}."
    )


def kills(options: argparse.Namespace, folder: Path) -> tuple[list[str], bool]:
    """The quickstart with servers that are killed at random moments of their first seconds, again and again."""
    chance = random.Random(options.seed)
    counted = {"starting": 0, "serving": 0}
    metrics = folder / "kills/run/metrics.jsonl"
    last = max(os.sched_getaffinity(0))

    def kill(child: subprocess.Popen) -> None:
        moved: set[int] = set()
        ends: dict[int, float] = {}
        while child.poll() is None:
            trains = metrics.exists() and metrics.read_text().count("\n") > 1  # a run that cannot start must end
            for process, command in servers_of(child.pid).items():
                if process not in moved:
                    move(process, last)
                    moved.add(process)
                if not trains or SERVER not in command or sum(counted.values()) == options.kills:
                    continue
                ends.setdefault(process, time.monotonic() + chance.uniform(0, options.life))
                up = serves(command)
                if time.monotonic() < ends[process] or (options.spare_starting and not up):
                    continue
                try:
                    os.kill(process, signal.SIGKILL)
                except ProcessLookupError:
                    continue
                counted["serving" if up else "starting"] += 1
                ends[process] = float("inf")
                print(f"kill {sum(counted.values())}", "serving" if up else "starting", flush=True)
            time.sleep(0.1)

    extra = ["--engine", "vllm-server", "--num_servers", str(options.servers), "--max_steps", str(options.steps)]
    began = time.monotonic()
    rows = run(folder / "kills", [*QUICKSTART, *extra, *options.more], 1, kill)[1:]
    per_step = [completions(row) for row in rows]
    wanted = 32 * 8
    total, asked = sum(per_step), wanted * options.steps
    fine = len(rows) == options.steps and set(per_step) == {wanted} and accuracy(rows) >= ACCURACY
    lines = ["| servers | kills (while serving, starting) | steps | completions trained / asked | accuracy | minutes |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    struck = f"{sum(counted.values())} ({counted['serving']}, {counted['starting']})"
    minutes = (time.monotonic() - began) / 60
    cells = f"{struck} | {len(rows)} | {total:,} / {asked:,} | {accuracy(rows):.3f} | {minutes:.1f}"
    lines.append(f"| {options.servers} | {cells} |")
    return lines, fine


def speed(options: argparse.Namespace, folder: Path) -> tuple[list[str], bool]:
    """Sampling and syncs of one policy in this process, on its first cores; the engines in turn."""
    stay_on(options.cores)
    from transformers import AutoTokenizer

    from loops.shared.models import ModelConfig, build_policy
    from loops.shared.rollout import RolloutConfig, Sampling, build_engine

    model, rows_file = gsm8k(options, folder)
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in read_rows(rows_file)]
    sampling = Sampling(max_completion_length=options.completion_tokens)
    syncs: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {}
    for lora in (0, 32):
        shape = ModelConfig(model_id=str(model), lora_r=lora, torch_dtype="float32")
        policy = build_policy(shape, seed=0, device="cpu").eval()
        kinds = ("transformers", "vllm", "vllm-server")
        engines = {
            kind: build_engine(RolloutConfig(engine=kind, weight_sync="adapter" if lora else "full"), policy, tokenizer)
            for kind in kinds
        }
        what = f"adapter of rank {lora}" if lora else "full weights"
        for kind, engine in engines.items():
            reports = [engine.sync(policy) for _ in range(options.syncs + 1)][1:]
            if reports[0].tensors:
                label = f"{what}, {kind}, {reports[0].bytes / 2**20:.1f} MiB"
                syncs[label] = sorted(report.seconds for report in reports)
        for pair in range(options.pairs + 1):  # the first of each warms up
            for kind, engine in engines.items():
                began = time.perf_counter()
                numbers = list(range(len(prompts)))
                groups = engine.sample(
                    prompts, n=options.generations, sampling=sampling, seed=pair, prompt_numbers=numbers
                )
                taken = time.perf_counter() - began
                tokens = sum(len(one.token_ids) for group in groups for one in group)
                if pair:
                    seconds.setdefault(f"{kind}, {what}", []).append(1000 * taken / tokens)
                print(f"{what} {kind}: {tokens} tokens in {taken:.2f} s", file=sys.stderr, flush=True)
        for engine in engines.values():
            engine.close()
    lines = ["| sampling | milliseconds a token | against transformers, in each pair |", "| --- | --- | --- |"]
    for label, values in seconds.items():
        base = seconds["transformers, " + label.partition(", ")[2]]
        shown = " ".join(f"{b / a:.2f}" for a, b in zip(values, base, strict=True))
        lines.append(f"| {label} | {median(values):.3f} | {shown} x |")
    lines += ["", "| sync | median | fastest | slowest |", "| --- | --- | --- | --- |"]
    for label, values in syncs.items():
        cells = (median(values), values[0], values[-1])
        lines.append(f"| {label} | " + " | ".join(f"{1000 * value:.1f} ms" for value in cells) + " |")
    return lines, True


def syncs(options: argparse.Namespace, folder: Path) -> tuple[list[str], bool]:
    """A policy that moves and is synced again and again: how far are the log-probabilities of what is sampled then from
    those of the forward that trains?

    Both sides round to float32; how far each is from the same weights in float64 says what of it is rounding.
    """
    stay_on(options.cores)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from data.pack import pack_groups
    from loops.shared.models import ModelConfig, build_policy
    from loops.shared.policy import enable_packing, score
    from loops.shared.rollout import RolloutConfig, Sampling, build_engine
    from loops.shared.weights import iter_weights

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    exact = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float64).eval()
    rows = evenly(read_rows(ROOT / "data/quickstart/heldout.jsonl"), 3)
    prompts = [tokenizer(chat_text(row, tokenizer), add_special_tokens=False)["input_ids"] for row in rows]
    prompts.append(prompts[0] * 10)  # longer than a block of the prefix cache: old keys would show
    sampling = Sampling(max_completion_length=16)
    lines = [
        "| what is synced | syncs | tokens | differences, nats: root mean square | worst | sampler and trainer "
        "from float64 | frozen bytes | tensors, bytes a sync |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    fine = True
    for what in options.kinds:
        engine_name, sync, fields = SYNCED[what]
        shape = ModelConfig(model_id=str(MODEL), torch_dtype="float32", **fields)
        policy = build_policy(shape, seed=0, device="cpu").eval()
        enable_packing(policy)
        frozen, gaps = frozen_bytes(policy), []
        engine = build_engine(RolloutConfig(engine=engine_name, weight_sync=sync), policy, tokenizer)
        generator = torch.Generator().manual_seed(options.seed)
        for number in range(options.syncs):
            move_weights(policy, generator, options.step or (2e-3 if fields["lora_r"] else 2e-4))
            report = engine.sync(policy)
            numbers = list(range(len(prompts)))
            groups = engine.sample(prompts, n=2, sampling=sampling, seed=number, prompt_numbers=numbers)
            weights = dict(iter_weights(policy, dtype=torch.float64))
            exact.load_state_dict({"lm_head.weight": weights["model.embed_tokens.weight"]} | weights)  # a tied head
            asked = list(zip(prompts, groups, strict=True))
            batch = pack_groups([(prompt, [one.token_ids for one in group]) for prompt, group in asked])
            with torch.no_grad():
                trainer = score(policy, batch).logprobs[batch.mask].double()
            sampler = torch.tensor([value for group in groups for one in group for value in one.logprobs]).double()
            true = torch.cat([scored(exact, prompt, one.token_ids) for prompt, group in asked for one in group])
            gaps.append(torch.stack([sampler - trainer, sampler - true, trainer - true]))
            fine &= all(one.weight_version == report.weight_version for group in groups for one in group)
        engine.close()
        gap = torch.cat(gaps, 1)
        spread, worst = float(gap[0].square().mean().sqrt()), gap.abs().amax(1).tolist()
        same = frozen == frozen_bytes(policy)
        fine &= same and worst[0] <= MISMATCH
        kept = ("the same" if same else "CHANGED") if fields["lora_r"] else "none"
        sent = f"{report.tensors}, {report.bytes:,}"
        shown = "{:.2g} | {:.3g} | {:.2g}, {:.2g}".format(spread, *worst)
        lines.append(f"| {what} | {options.syncs} | {gap.shape[1]:,} | {shown} | {kept} | {sent} |")
        print(lines[-1], flush=True)
    return lines, fine


def move_weights(policy: Any, generator: Any, size: float) -> None:
    """Adds normal noise of that standard deviation to all that is trained."""
    import torch

    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def scored(policy: Any, prompt: list[int], completion: list[int]) -> Any:
    """Log-probabilities of the completion's tokens by one plain forward: [T] in float64."""
    import torch

    with torch.no_grad():
        logits = policy(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0]


def frozen_bytes(policy: Any) -> str:
    """Hash of all that is not trained, as it is stored (of 4-bit weights their constants too)."""
    import torch

    digest = hashlib.sha256()
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    for name, tensor in policy.state_dict().items():
        if name not in trained:
            digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def stay_on(cores: int) -> None:
    """Keep this process, and the servers that it starts, on its first cores; before torch is read."""
    use_cores(cores)
    os.environ.update(environment(cores))
    import torch

    torch.set_num_threads(cores)


def gsm8k(options: argparse.Namespace, folder: Path) -> tuple[Path, str]:
    """A 30M model with random weights, and prompts of two solved problems and a question."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    write_model(folder / "model", SHAPES["30m"], tokenizer)
    prompts = evenly(two_shot_prompts(read_rows(options.rows), tokenizer), options.prompts)
    return folder / "model", write_rows(folder / "rows.jsonl", prompts)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", help="a new folder for the runs (default: one that is deleted)")
    tables = parser.add_subparsers(dest="table", required=True)
    one = tables.add_parser("learn")
    one.add_argument("--setups", nargs="+", choices=SETUPS, default=list(SETUPS))
    one.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44])
    one.add_argument("--steps", type=int, default=100)
    one.add_argument("--cores", type=int, default=1, help="of the run and its servers together")
    two = tables.add_parser("overlap")
    two.add_argument("--workload", choices=["quickstart", "gsm8k"], default="quickstart")
    two.add_argument("--pairs", type=int, default=2, help="runs of each level, in turn; 0: not run")
    two.add_argument("--steps", type=int, default=20, help="counted steps of a run, after two that are not")
    two.add_argument("--learn_steps", type=int, default=100, help="of the quickstart at level 1; 0: not run")
    three = tables.add_parser("kills")
    three.add_argument("--kills", type=int, default=50)
    three.add_argument("--steps", type=int, default=200)
    three.add_argument("--servers", type=int, default=2)
    three.add_argument("--life", type=float, default=30.0, help="seconds within which a server process is killed")
    three.add_argument("--spare_starting", action="store_true", help="kill only servers that answer already")
    three.add_argument("--seed", type=int, default=0, help="of the moments")
    four = tables.add_parser("speed")
    four.add_argument("--pairs", type=int, default=2)
    four.add_argument("--syncs", type=int, default=20)
    four.add_argument("--cores", type=int, default=1)
    five = tables.add_parser("syncs")
    five.add_argument("--syncs", type=int, default=100, help="of each kind")
    moves = (
        "by how much weights move before each (default: the quickstart's learning rates, 2e-4 and for adapters 2e-3)"
    )
    five.add_argument("--step", type=float, help=moves)
    five.add_argument("--seed", type=int, default=0, help="of the moves")
    five.add_argument("--kinds", nargs="+", choices=SYNCED, default=list(SYNCED))
    five.add_argument("--cores", type=int, default=1)
    for table in (two, four):
        table.add_argument("--prompts", type=int, default=4, help="a step")
        table.add_argument("--generations", type=int, default=8, help="completions a prompt")
        table.add_argument("--completion_tokens", type=int, default=128)
        table.add_argument("--rows", default=SHARED / "data/gsm8k_train.jsonl", help="JSONL of question and answer")
        table.add_argument("--tokenizer", default=SHARED / "tokenizers/smollm2-135m-instruct", help="its folder")
    for table in (one, two, three):
        table.add_argument("--more", nargs=argparse.REMAINDER, default=[], help="more options of the runs")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    text = heading("rollouts.py", f"{os.cpu_count()} cores", ("torch", "transformers", "vllm"))
    table = {"learn": learn, "overlap": overlap, "kills": kills, "speed": speed, "syncs": syncs}[options.table]
    with tempfile.TemporaryDirectory() as temporary:
        lines, fine = table(options, Path(options.keep or temporary))
    print(f"\n{text}\n" + "\n".join(lines))
    raise SystemExit(0 if fine else 1)


if __name__ == "__main__":
    main()
