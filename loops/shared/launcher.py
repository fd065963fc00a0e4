"""What the process that started this one asked for: `accelerate launch`, torchrun, or nobody.

Beside run.py the only file of the loops that reads the environment.
"""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator

from loops.shared.sharding import Sharding, build_accelerator, is_sharded, read_launcher_sharding


def start_accelerator(
    mixed_precision: str, own: Sharding | None, timeout: timedelta
) -> tuple[Accelerator, Sharding | None]:
    """The Accelerator of this process, and the sharding that the config (`own`) or the launcher asks for.

    mixed_precision: no, bf16 or auto. timeout: of the process group. Raises ValueError where the launcher's settings
    contradict the loop's.
    """
    on_cpu = not torch.accelerator.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")
    precision = choose_precision(mixed_precision, on_cpu)
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise ValueError(
            "dynamo_backend is set in the launcher, which would compile every shape of a batch: set it to no there; "
            "compile: true in the loop's config compiles the layers."
        )
    for name, word in (("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM")):
        if os.environ.get(name, "false").lower() == "true":
            raise ValueError(f"the launcher asks for {word}; the loops shard with FSDP2: set fsdp: full_shard instead.")
    launchers = read_launcher_sharding(os.environ)
    if launchers and own:
        raise ValueError("fsdp is set in the config and in the launcher's file; leave it in one of them.")
    sharding = own or launchers
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if sharding is None or processes == 1:  # or accelerate would shard by the launcher's word alone
        os.environ.pop("ACCELERATE_USE_FSDP", None)
    accelerator = build_accelerator(
        sharding,
        precision=precision,
        on_cpu=on_cpu,
        processes=processes,
        per_machine=int(os.environ.get("LOCAL_WORLD_SIZE", processes)),
        timeout=timeout,
    )
    if accelerator.num_processes != processes:
        raise ValueError(
            f"the launcher asked for {processes} processes but this one runs alone; start with "
            f"`accelerate launch --multi_gpu --num_processes {processes} ...`, on CPUs too."
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError("gradient_accumulation_steps is set in the launcher; give it to the loop instead.")
    assert is_sharded(accelerator) == (sharding is not None and processes > 1), accelerator.distributed_type
    assert accelerator.mixed_precision == precision
    if on_cpu and processes == 1 and not threads_are_set():
        torch.set_num_threads(available_cpus())
    return accelerator, sharding


def choose_precision(own: str, on_cpu: bool) -> str:
    """`no` or `bf16`: the config's `own`, or for `auto` the launcher's, else bf16 on a GPU that has it."""
    launchers = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if own == "auto":
        on_gpu = not on_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        own = "bf16" if launchers == "bf16" or on_gpu else "no"
    if launchers not in ("no", own):
        raise ValueError(
            f"mixed_precision is {launchers} in the launcher's settings and {own} here: give the loop's own "
            f"mixed_precision (no or bf16), and the launcher the same or no."
        )
    return own


def started_by_accelerate() -> bool:
    """Whether `accelerate launch` started this process itself; several processes are started by torchrun."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ


def threads_are_set() -> bool:
    """Whether the user chose a number of threads; one per process is also what the launcher sets by itself."""
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads != "1" or not started_by_accelerate():
        return threads is not None
    with suppress(OSError):  # outside Linux
        return b"\0OMP_NUM_THREADS=" in b"\0" + Path(f"/proc/{os.getppid()}/environ").read_bytes()
    return False


def available_cpus(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """CPUs that this process may use at once: those it may run on, within its container's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # version 2, version 1
        with suppress(OSError, ValueError):
            quota, period = " ".join((groups / name).read_text() for name in names).split()
            if int(quota) > 0:
                count = min(count, max(1, int(quota) // int(period)))
    return count
