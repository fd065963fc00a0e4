"""One rank of a SageMaker job: runs a loop's file, and writes the error that ends it into the failure file.

`launch/sagemaker/entry.py` puts it between the launcher and the loop: `accelerate launch ... -m launch.sagemaker.rank
loops/grpo.py --config ...`. The launcher itself only knows that a child has failed, not why. Standard library only.
"""

from __future__ import annotations

import os
import runpy
import socket
import sys
import traceback
from pathlib import Path
from types import TracebackType

from launch.sagemaker.folders import find_folders

FAILURE_LENGTH = 1024  # characters that SageMaker shows
# How the ranks that are still there see one that has gone: never the reason, whatever host it comes from.
LOST_CONTACT = ("Connection closed by peer", "Connection reset by peer", "NCCL", "recvValue failed", "Broken pipe")


def main() -> None:
    """Run `sys.argv[1]` as `__main__` with the rest as its arguments."""
    del sys.argv[0]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        if stop.code not in (None, 0, 143):  # 143: stopped by SIGTERM, with a checkpoint
            reason = stop.__context__ if isinstance(stop.__context__, Exception) else stop
            write_failure(f"{type(reason).__name__}: {reason}", find_folders().failure)
        raise
    except Exception as error:
        error = error.with_traceback(_of_the_script(error.__traceback__))
        write_failure(describe(error), find_folders().failure)
        raise error


def describe(error: Exception) -> str:
    """The error in a line and the end of its traceback, where the frames of the user's own code are."""
    line = f"{type(error).__name__}: {error}".partition("\n")[0]
    if any(word in str(error) for word in LOST_CONTACT):
        line = f"lost contact with another rank, whose log has the first error ({line})"
    text = "".join(traceback.format_exception(error))
    room = FAILURE_LENGTH - len(line) - 60  # and the name of the rank
    return f"{line}\n{text if len(text) <= room else '...' + text[len(text) - room + 3 :]}"


def write_failure(text: str, path: Path) -> None:
    """Write the failure file, unless an earlier error has."""
    rank = f"rank {os.environ.get('RANK', '0')} of {os.environ.get('WORLD_SIZE', '1')}"
    host = os.environ.get("SM_CURRENT_HOST", socket.gethostname())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "x") as file:
            file.write(f"{rank} on {host}: {text.rstrip()}"[:FAILURE_LENGTH])
    except FileExistsError:
        return


def _of_the_script(trace: TracebackType | None) -> TracebackType | None:
    """The traceback without the frames of this file and of runpy that stand before the script's."""
    own = (__file__, runpy.__file__, "<frozen runpy>")
    while trace is not None and trace.tb_next is not None and trace.tb_frame.f_code.co_filename in own:
        trace = trace.tb_next
    return trace


if __name__ == "__main__":
    main()
