"""Run a script as `python SCRIPT` would, on a given number of cores, and write its peak memory down.

    python benchmarks/child.py PEAK.json CORES SCRIPT [ARGUMENTS]

Both sides of the comparison run through it. CORES 0 takes all that there are.
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


def use_cores(count: int) -> None:
    """Keep this process on its first `count` cores; PyTorch's and the loops' thread counts follow from that."""
    if count and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


if __name__ == "__main__":
    peak_file, cores, script = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]).resolve()
    use_cores(cores)
    sys.argv = [str(script), *sys.argv[4:]]
    sys.path[0] = str(script.parent)
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        peak_file.write_text(json.dumps({"peak": peak_bytes()}))
