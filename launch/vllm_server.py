"""A vLLM server that takes weights from a run of this project, and ends with whoever started it.

    python launch/vllm_server.py --model MODEL --port 8000

All options are those of vLLM's own server; what training needs besides is switched on here: the routes for weight
updates and adapters, and token ids in and out. A run connects to it with `--engine vllm-server --server_urls`. It binds
to loopback unless `--host` says otherwise. With a key (`VLLM_API_KEY` in the environment) only /health and /metrics
answer without it; of vLLM's own accord anybody could change the weights. A run that starts its own servers calls this
file too, with `--parent`: the server then ends when that process does, however it ends.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

_PR_SET_PDEATHSIG = 1
_FORK = "PLUMBLINE_FORK_ENGINE"
_SECONDS_TO_STOP = 5.0
_OPEN = ("/health", "/metrics")  # routes that a load balancer or Prometheus asks, without a key


def environment(base: Mapping[str, str], options: Sequence[str], *, on_cpu: bool, gpus: str | None) -> dict[str, str]:
    """The server's environment variables: `base`, with what it needs; a value that `base` has stands.

    gpus: numbers among the visible GPUs, comma-separated; None leaves all of them.
    """
    needed = {
        "VLLM_SERVER_DEV_MODE": "1",  # routes for weight updates, pausing and the prefix cache
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    if on_cpu:
        needed |= {
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # threads go where the scheduler puts them, beside the trainer's
            "TORCHDYNAMO_DISABLE": "1",  # else two small functions of the sampler are compiled for many seconds
            # Memory that is freed is kept: fresh pages are half of what a sync costs.
            "GLIBC_TUNABLES": f"glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold={2**40}",
        }
        if not any(re.match("-tp|--tensor[-_]parallel", option) for option in options):
            needed["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # a process less
            needed[_FORK] = "1"
    variables = needed | dict(base)
    if gpus is not None:
        visible = base.get("CUDA_VISIBLE_DEVICES")
        numbers = [int(number) for number in gpus.split(",")]
        names = visible.split(",") if visible else [str(number) for number in range(max(numbers) + 1)]
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(names[number] for number in numbers)
    return variables


def fork_engine() -> None:
    """In a server on a CPU, fork the engine; an entry point of vLLM's plugins, which every process of vLLM's calls.

    vLLM's CPU build starts a new interpreter, which imports everything once more: half of a server's start. The forked
    one has the server's socket too, so it must not outlive it.
    """
    if os.environ.pop(_FORK, "") != "1":
        return
    from vllm.platforms import current_platform

    platform: Any = type(current_platform)
    check = platform.check_and_update_config

    def check_and_fork(config: object) -> None:
        check(config)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"

    platform.check_and_update_config = staticmethod(check_and_fork)
    os.register_at_fork(after_in_child=end_with_parent)


class KeyOnEveryRoute:
    """ASGI middleware: vLLM asks for its key where it samples, this one also where weights are changed."""

    def __init__(self, app: Any):
        from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

        async def as_it_came(scope: Any, receive: Any, send: Any) -> None:
            await app(scope["as_it_came"], receive, send)

        self._app = app
        self._guard = AuthenticationMiddleware(as_it_came, [os.environ["VLLM_API_KEY"]])

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope.get("path") in _OPEN:
            await self._app(scope, receive, send)
        else:  # every other route is one that vLLM guards
            await self._guard({**scope, "path": "/v1", "root_path": "", "as_it_came": scope}, receive, send)


def has_cpu_build() -> bool:
    """Whether the installed vLLM is the CPU build."""
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def end_with_parent() -> None:
    """Called in a new process: ask Linux to kill it when its parent is gone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main(argv: Sequence[str]) -> int:
    """Run the server until it ends, a signal comes, or the parent is gone; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parent", type=int, help="process whose end ends the server")
    parser.add_argument("--gpus", help="numbers of the GPUs to use, comma-separated; default: all")
    parser.add_argument("--api-key", help="VLLM_API_KEY, which nobody sees in a list of processes, is better")
    own, options = parser.parse_known_args(argv)
    on_cpu = has_cpu_build()
    variables = environment(os.environ, options, on_cpu=on_cpu, gpus=own.gpus)
    if own.api_key:
        variables["VLLM_API_KEY"] = own.api_key
    defaults = ["--host=127.0.0.1", '--weight-transfer-config={"backend": "plumbline"}']
    if on_cpu:  # nothing is compiled there, and a seeded completion fails whose prompt is computed in pieces
        defaults += ["--enforce-eager", "--no-enable-chunked-prefill"]
        defaults.append(f"--kv-cache-memory-bytes={2**30}")  # not a share of the machine's memory
    given = {option.split("=")[0] for option in options}
    options = [*(option for option in defaults if option.split("=")[0] not in given), *options]
    if variables.get("VLLM_API_KEY"):
        options.append("--middleware=launch.vllm_server.KeyOnEveryRoute")

    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: stopped.append(received))
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enable-scale-out", *options]
    server = subprocess.Popen(
        command,
        env=variables,
        stdin=subprocess.DEVNULL,
        preexec_fn=end_with_parent,
        start_new_session=own.parent is None,  # else all share the group that the run made, and can end
    )
    try:
        while server.poll() is None and not stopped and own.parent in (None, os.getppid()):
            time.sleep(0.1)
        if server.poll() is None:
            server.terminate()
            try:
                server.wait(_SECONDS_TO_STOP)
            except subprocess.TimeoutExpired:
                print("vllm_server.py: the server does not stop; killing it", file=sys.stderr)
    finally:
        status = server.poll()
        try:
            # Its workers; in a run they share our group, and we end with them.
            os.killpg(server.pid if own.parent is None else os.getpgrp(), signal.SIGKILL)
        except ProcessLookupError:
            pass
    return 1 if status is None else status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
