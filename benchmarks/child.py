"""Run a script as `python SCRIPT` would, on a given number of cores, and write down what it ran on and its peak memory.

    python benchmarks/child.py SEEN CORES SCRIPT [ARGUMENTS]

Both sides of the comparison run through it. CORES 0 takes all that there are; of several processes that a launcher
started, each takes the next CORES. SEEN is a path that gets the number of the process and `.json` added.
"""

import json
import os
import resource
import runpy
import sys
from pathlib import Path


def peak_bytes() -> int:
    """Largest memory of this process: PyTorch's own count on a GPU once it was used, else resident memory."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    for line in lines:  # ru_maxrss would start from the size of the process that started this one
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def use_cores(count: int, place: int = 0) -> None:
    """Keep this process on its next `count` cores, after `place` times as many; thread counts follow from that."""
    if count and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[count * place : count * (place + 1)])


def seen() -> dict[str, int]:
    """Peak memory in bytes, cores (0 where a process cannot be kept on some) and PyTorch's threads of this process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    torch = sys.modules.get("torch")
    return {"peak": peak_bytes(), "cores": cores, "threads": torch.get_num_threads() if torch else 1}


if __name__ == "__main__":
    rank = int(os.environ.get("LOCAL_RANK", 0))
    file, cores, script = Path(f"{sys.argv[1]}{rank}.json"), int(sys.argv[2]), Path(sys.argv[3]).resolve()
    use_cores(cores, rank)
    sys.argv = [str(script), *sys.argv[4:]]
    sys.path[0] = str(script.parent)
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        file.write_text(json.dumps(seen()))
