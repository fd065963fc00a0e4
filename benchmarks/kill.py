"""Kill runs at random points, start them again, and compare their last weights with those of an uninterrupted run.

    python benchmarks/kill.py --kills 200

A case is a loop (sft, dpo, grpo) on one process, DDP x 2 or FSDP2 x 2. A run of a case is a few steps of its quickstart
with a checkpoint after each; it is killed with SIGKILL again and again until an attempt comes through: at the n-th
step, inside the n-th generation, at the n-th write, rename or removal of a file (so between a checkpoint's rename and
the pruning of the old ones too), or after a random time. Prints a row a case and ends with 1 where a hash differs.

Processes are forked from one that has imported everything, so an attempt costs seconds.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

from configs.loader import load_config
from loops import dpo, grpo, sft
from loops.shared.rollout.transformers_engine import TransformersEngine

HOUSE = Path(__file__).resolve().parents[1]
LOOPS = {"sft": sft, "dpo": dpo, "grpo": grpo}
TOPOLOGIES = {"one": (1, []), "ddp2": (2, []), "fsdp2": (2, ["--fsdp", "full_shard"])}
SETTINGS = {
    "sft": ["--per_device_train_batch_size", "8"],
    "dpo": ["--per_device_train_batch_size", "4", "--lora_r", "4", "--lora_dropout", "0.1"],
    "grpo": ["--per_device_train_batch_size", "16", "--num_generations", "4", "--max_completion_length", "12"],
}
STEPS = 5
POINTS = {  # -> how often a run comes there, about
    "step": STEPS,
    "generation": 12,
    "fsync": 40,
    "before rename": 2 * STEPS,
    "after rename": 2 * STEPS,
    "removal": 8 * STEPS,
    "time": 1,
}
PATIENCE = 20.0  # seconds until the others get the SIGTERM that a launcher would send them
DEADLINE = 60.0  # seconds that a process may outlive a killed one, and
LENGTHS = 10.0  # times that a whole run took: a machine that is busy with other things is no hang


def options(loop: str, topology: str, folder: Path) -> list[str]:
    common = ["--config", f"configs/{loop}.yaml", "--output_dir", str(folder), "--resume_from", "latest"]
    common += [
        "--max_train_samples",
        "64",
        "--max_steps",
        str(STEPS),
        "--save_steps",
        "1",
        "--save_total_limit",
        "1",
        "--max_eval_samples",
        "2",
    ]
    return [*common, "--log_completions_steps", "0", *SETTINGS[loop], *TOPOLOGIES[topology][1]]


def die_at(loop: str, point: str, count: int) -> None:
    """Make this process kill itself when it comes to `point` for the count-th time."""
    left = [count]

    def reached() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def wrap(owner, name: str, *, after: bool = False) -> None:
        original = getattr(owner, name)

        def wrapped(*arguments, **named):
            if not after:
                reached()
            result = original(*arguments, **named)
            if after:
                reached()
            return result

        setattr(owner, name, wrapped)

    if point == "step":
        wrap(LOOPS[loop].optim, "clip_gradients")
    elif point == "generation":
        wrap(TransformersEngine, "_forward")
    elif point == "fsync":
        wrap(os, "fsync")
    elif point in ("before rename", "after rename"):
        wrap(os, "replace", after=point == "after rename")
    elif point == "removal":
        wrap(os, "unlink")


def start(loop: str, topology: str, folder: Path, log: Path, victim: int | None, point: str, count: int) -> list[int]:
    """Fork the processes of one attempt; returns their ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = TOPOLOGIES[topology][0]
    children = []
    for rank in range(processes):
        child = os.fork()
        if child:
            children.append(child)
            continue
        code = 1
        try:
            os.setpgid(0, 0)
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            faulthandler.register(signal.SIGUSR1, file=descriptor)
            if processes > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                os.environ |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            if rank == victim:
                die_at(loop, point, count)
            LOOPS[loop].main(load_config(LOOPS[loop].Config, options(loop, topology, folder), prog=loop))
            code = 0
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return children


def attempt(loop, topology, folder, log, *, length=60.0, victim=None, point="", count=0, seconds=None):
    """One attempt: whether all processes came through, and the seconds that others outlived the killed one.

    `length` is what a run takes here and now, in seconds."""
    deadline = DEADLINE + LENGTHS * length
    children = start(loop, topology, folder, log, victim, point, count)
    began, codes, killed_at, last, told = time.monotonic(), {}, None, time.monotonic(), []
    while len(codes) < len(children):
        for rank, child in enumerate(children):
            if rank in codes:
                continue
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                codes[rank], last = os.waitstatus_to_exitcode(status), time.monotonic()
                if codes[rank] == -signal.SIGKILL and killed_at is None:
                    killed_at = last
        now = time.monotonic()
        if seconds is not None and victim not in codes and now - began > seconds:
            os.kill(children[victim], signal.SIGKILL)
        if killed_at and now - killed_at > PATIENCE and not told:  # as torchrun does, at once
            told = [os.kill(child, signal.SIGTERM) for rank, child in enumerate(children) if rank not in codes]
        if now - (killed_at or began) > deadline:
            left = [child for rank, child in enumerate(children) if rank not in codes]
            states = [Path(f"/proc/{child}/stat").read_text().split()[2] for child in left]
            for number in (signal.SIGUSR1, signal.SIGKILL):  # say where you are, and end
                for child in left:
                    os.kill(child, number)
                time.sleep(2)
            since = f"{deadline:.0f} s after the {'kill' if killed_at else 'start'}"
            text = log.read_text()[-6000:]
            raise SystemExit(f"{loop} {topology}: {codes} ended, others ({states}) live {since}:\n{text}")
        time.sleep(0.01)
    through = all(code == 0 for code in codes.values())
    if not through and killed_at is None:
        raise SystemExit(f"{loop} {topology}: ended with {codes} and nobody killed it:\n{log.read_text()[-4000:]}")
    return through, 0.0 if killed_at is None else last - killed_at


def fingerprint(folder: Path) -> str:
    """Of the exported weights."""
    digest = hashlib.sha256()
    for path in sorted((folder / "model").glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def run_case(loop: str, topology: str, kills: int, chance: random.Random, parent: Path) -> dict:
    """Runs of a case until it was killed `kills` times; every run is finished and compared."""
    log = parent / f"{loop}-{topology}.log"
    whole = parent / f"{loop}-{topology}-whole"
    began = time.monotonic()
    assert attempt(loop, topology, whole, log)[0]
    length = time.monotonic() - began
    expected, counted, runs, equal, outlived = fingerprint(whole), dict.fromkeys(POINTS, 0), 0, 0, 0.0
    while sum(counted.values()) < kills:
        folder = parent / f"{loop}-{topology}-{runs}"
        for tries in range(1000):
            # the last attempts of a run come through: what is to be shown is the weights at its end
            point = chance.choice(list(POINTS)) if tries < 12 and sum(counted.values()) < kills else ""
            victim = chance.randrange(TOPOLOGIES[topology][0]) if point else None
            seconds = chance.uniform(0.05, length) if point == "time" else None
            count = chance.randint(1, max(1, POINTS.get(point, 1) // (1 + tries)))  # less is left of the run each time
            dies = {"victim": victim, "point": point, "count": count, "seconds": seconds}
            through, later = attempt(loop, topology, folder, log, length=length, **dies)
            outlived = max(outlived, later)
            if through:
                break
            counted[point] += 1
        runs += 1
        equal += fingerprint(folder) == expected
        shutil.rmtree(folder)
    return {"case": f"{loop} {topology}", "kills": counted, "runs": runs, "equal": equal, "outlived": outlived}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="over all cases together")
    parser.add_argument("--loops", nargs="+", choices=LOOPS, default=list(LOOPS))
    parser.add_argument("--topologies", nargs="+", choices=TOPOLOGIES, default=list(TOPOLOGIES))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.chdir(HOUSE)
    torch.set_num_threads(1)  # before any work here: forked processes hang in thread pools that they do not have
    chance = random.Random(arguments.seed)
    cases = [(loop, topology) for loop in arguments.loops for topology in arguments.topologies]
    wrong = 0
    print("| case | kills | at | runs | equal hashes | survivors ended within |", flush=True)
    print("|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as parent:
        for number, (loop, topology) in enumerate(cases):
            kills = arguments.kills // len(cases) + (number < arguments.kills % len(cases))
            row = run_case(loop, topology, kills, chance, Path(parent))
            points = ", ".join(f"{point} {count}" for point, count in row["kills"].items() if count)
            wrong += row["runs"] - row["equal"]
            print(
                f"| {row['case']} | {sum(row['kills'].values())} | {points} | {row['runs']} | {row['equal']} "
                f"| {row['outlived']:.1f} s |",
                flush=True,
            )
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
