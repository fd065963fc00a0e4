"""vLLM servers: completions over HTTP, token ids in and out, from one or several servers that serve the same weights.

Rank 0 starts the servers (or connects to running ones), sends weights, and starts again what died; every rank samples
its own prompts. A request whose server dies, hangs, or answers for older weights is sent again: each prompt's
completions are counted once, when they arrive.
"""

from __future__ import annotations

import atexit
import json
import logging
import secrets
import shutil
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import torch

from loops.shared.layers import unwrap
from loops.shared.rollout.config import Sampling
from loops.shared.rollout.engine import Arrived, Completion, SyncReport, build_completions
from loops.shared.rollout.server import POLL_SECONDS, Server, ServerLostError
from loops.shared.rollout.vllm_setup import VllmSetup
from loops.shared.rollout.weight_transfer import (
    BroadcastTransport,
    Bucket,
    FileTransport,
    Transport,
    abort_update,
    buckets,
    free_port,
    write_adapter,
)
from loops.shared.weights import iter_weights

logger = logging.getLogger(__name__)

_NAME = "policy"
_LOSSES = 8
# What vLLM says of a tensor that it has no place for; sending it again would not help.
_MISFITS = ("no module or parameter", "left out weights", "exceeds dimension size", "size mismatch", "shape")


class VllmServerEngine:
    """The engine `vllm-server`. `sample` may run in a thread while the policy trains, and while it is synced."""

    is_off_policy = True

    def __init__(self, setup: VllmSetup, api_key: str | None = None):
        """Starts the servers, or connects to running ones; collective over all processes.

        api_key: of the servers, if they have one.

        Raises ValueError: a port is in use, or a server has another key or too little memory.
        """
        self.weight_version = 0
        self._setup = setup
        self._config = setup.config
        self._api_key = api_key
        self._servers: list[Server] = []
        self._has_weights = False  # whether the last sync went through
        self._announced = 0  # newest version that a server may have by now
        self._snapshot: dict[str, torch.Tensor] = {}  # what was sent last, for servers that come back
        self._adapters: list[tuple[str, Path]] = []  # (name, folder) of those that servers hold, oldest first
        self._refusal: Exception | None = None  # of the update under way, by a server
        self._run = ""  # the run's name, once all ranks have it
        self._weights_lock = threading.RLock()  # one writer of weights at a time: sync, or a server that came back
        self._changed = threading.Condition()  # a server became ready or free, or everything failed
        self._failure: Exception | None = None
        self._closing = threading.Event()
        self._distributed = torch.distributed.is_initialized()
        self._rank = torch.distributed.get_rank() if self._distributed else 0
        self._folder = Path(setup.config.sync_dir or setup.folder).resolve() / f"sync-{secrets.token_hex(4)}"
        started: Any = None
        if self._rank == 0:
            try:
                started = self._start_servers()
            except Exception as error:
                self.close()
                started = error
        started = self._from_rank_0(started)
        if isinstance(started, Exception):
            raise started
        urls, self._run, self.max_model_len = started
        if self._rank != 0:
            self._servers = [
                Server(*numbered, Transport(), self._config.server_timeout, api_key) for numbered in enumerate(urls)
            ]
        atexit.register(self.close)
        for server in self._servers:
            server.ready = True
            threading.Thread(target=self._watch, args=(server,), daemon=True, name=f"watch-{server.url}").start()

    def _from_rank_0(self, value: Any) -> Any:
        """The value of rank 0, on every rank."""
        values = [value]
        if self._distributed:
            torch.distributed.broadcast_object_list(values, src=0)
        return values[0]

    def _ready(self) -> list[Server]:
        return [server for server in self._servers if server.ready]

    # ---- starting ----------------------------------------------------------------------------------------------------

    def _start_servers(self) -> tuple[list[str], str, int]:
        """Starts or finds all servers; returns what all ranks need: addresses, the run's name, the context length."""
        config = self._config
        urls = list(config.server_urls)
        for number in range(0 if urls else config.num_servers):
            port = config.server_port and config.server_port + number
            try:
                urls.append(f"http://127.0.0.1:{free_port(port)}")
            except OSError as error:
                text = f"port {port} is in use by another program: change server_port (0: any free one)."
                raise ValueError(text) from error
        for number, url in enumerate(urls):
            self._servers.append(
                Server(number, url, self._transport(number, url), config.server_timeout, self._api_key)
            )
        with ThreadPoolExecutor(len(urls)) as pool:
            list(pool.map(self._bring_up, self._servers))
        length = min(server.models()[0]["max_model_len"] for server in self._servers)
        return [server.url for server in self._servers], secrets.token_hex(4), length

    def _transport(self, number: int, url: str) -> Transport:
        kind = self._config.weight_transfer
        if kind == "auto":
            kind = "gloo" if self._setup.device == "cpu" or self._shares_gpu() else "nccl"
        if kind == "file":
            return FileTransport(self._folder, number)
        return BroadcastTransport(kind, host=_own_address(url), timeout=self._config.server_timeout)

    def _bring_up(self, server: Server) -> None:
        """Starts the server, or finds it running, and connects to its workers."""
        if self._config.server_urls:
            try:
                server.wait_until_up(10)
            except ServerLostError as error:
                raise ValueError(f"server_urls: {server.url} does not answer; start it, or correct it.") from error
        else:
            self._start(server)
        self._connect(server)
        server.call("/resume")  # another run may have ended in the middle of an update

    def _connect(self, server: Server) -> None:
        """Connects the server's workers with this process; ends an update that another run left unfinished."""
        try:
            server.connect()
            if self._config.server_urls:
                abort_update(server.control)
        except RuntimeError as error:
            raise ValueError(f"a server takes no weights ({error}): start it with launch/vllm_server.py.") from error

    def _start(self, server: Server) -> None:
        options = [f"--served-model-name={_NAME}"]
        if gpus := self._gpus(server.number):
            options.append(f"--gpus={gpus}")
        for name, value in self._setup.arguments(shares_gpu=self._shares_gpu()).items():
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                options.append(f"--{'' if value else 'no-'}{flag}")
            else:
                options.append(f"--{flag}={json.dumps(value) if isinstance(value, dict) else value}")
        server.start(options, self._setup.folder / f"server-{server.number}.log")
        try:
            if self._closing.is_set():
                raise ServerLostError("the engine is closed")
            server.wait_until_up(server.timeout)
        except ServerLostError as error:
            server.kill()
            raise ServerLostError(f"a vLLM server could not be started: {error}") from error

    def _shares_gpu(self) -> bool:
        return self._setup.device != "cpu" and not self._config.server_urls and self._gpus(0) is None

    def _gpus(self, number: int) -> str | None:
        """The GPUs of server `number`: those after the trainer's; None (shared with it) where they do not suffice."""
        if self._setup.device == "cpu":
            return None
        world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        size = self._config.vllm_tensor_parallel_size
        if torch.cuda.device_count() < world + size * self._config.num_servers:
            return None
        first = world + number * size
        return ",".join(str(gpu) for gpu in range(first, first + size))

    # ---- weights -----------------------------------------------------------------------------------------------------

    def sync(self, policy: torch.nn.Module) -> SyncReport:
        """Sends the policy's weights, or its adapter, to all servers; every process calls this.

        Completions under way are paused and continue with the new weights (their keys and values are computed again);
        they carry the older version. A server that is lost meanwhile gets all weights once it is back.

        Raises ValueError: vLLM has no place for a tensor, or one is missing; RuntimeError: no server takes the weights.
        """
        start = time.perf_counter()
        policy, setup = unwrap(policy), self._setup
        tensors = size = 0
        with self._weights_lock, torch.no_grad():
            version = self._announced = self.weight_version + 1
            self._refusal = None
            try:
                if not setup.sends_adapter or not self.weight_version:
                    weights = iter_weights(policy, dtype=setup.dtype, adapter=not setup.sends_adapter)
                    tensors, size = self._send(weights, version)
                if setup.sends_adapter:
                    count, adapter_bytes = self._send_adapter(policy, version)
                    tensors, size = tensors + count, size + adapter_bytes
                if refusal := self._from_rank_0(self._refusal):
                    self._each(self._ready(), self._release)
                    raise refusal
            except BaseException:
                self._has_weights = False
                raise
            self.weight_version, self._has_weights = version, True
        if self._rank == 0:
            self._wait_for(self._ready)
        return SyncReport(weight_version=version, tensors=tensors, bytes=size, seconds=time.perf_counter() - start)

    def _send(self, weights: Iterator[tuple[str, torch.Tensor]], version: int) -> tuple[int, int]:
        """Sends all weights to all servers in buckets; to the end even after a refusal, since all ranks gather them."""
        tensors = size = 0
        with ThreadPoolExecutor(1) as pool:
            taking = pool.submit(self._each, self._ready(), self._begin)
            for bucket in buckets(weights):
                tensors, size = tensors + len(bucket), size + sum(tensor.nbytes for _, tensor in bucket)
                if self._rank == 0:
                    self._remember(bucket)  # while they pause, or take the bucket before
                    taking = pool.submit(self._each, taking.result(), partial(Server.send, bucket=bucket))
        if self._refusal is None:
            self._each(taking.result(), partial(self._finish, version=version))
        if self._refusal is not None:
            self._snapshot.clear()
        return tensors, size

    def _remember(self, bucket: Bucket) -> None:
        """Keeps a copy in host memory, for a server that has to be given the same weights later."""
        for name, tensor in bucket:
            if name in self._snapshot:
                self._snapshot[name].copy_(tensor)
            else:
                self._snapshot[name] = tensor.to("cpu", copy=True)

    def _each(self, servers: list[Server], action: Callable[[Server], Any]) -> list[Server]:
        """Runs `action` on all servers at once (on rank 0) and returns those where it succeeded.

        A server where it failed is lost, and gets all weights once it is back. Weights that do not fit the model are a
        `_refusal`.
        """
        if self._rank != 0 or not servers:
            return []
        with ThreadPoolExecutor(len(servers)) as pool:
            errors = [future.exception() for future in [pool.submit(action, server) for server in servers]]
        for server, error in zip(servers, errors, strict=True):
            if isinstance(error, RuntimeError) and any(words in str(error) for words in _MISFITS):
                self._refusal = ValueError(f"vLLM refused the policy's weights: {error}")
            elif isinstance(error, ServerLostError | RuntimeError):
                self._mark_lost(server, server.life, error)
            elif error is not None:
                self._refusal = error
        return [server for server, error in zip(servers, errors, strict=True) if error is None]

    def _begin(self, server: Server) -> None:
        server.call("/pause?mode=keep&clear_cache=true")
        server.control("start_weight_update")

    def _finish(self, server: Server, version: int) -> None:
        server.control("finish_weight_update", weight_version=f"{self._run}:{version}")
        if not server.call("/reset_prefix_cache?reset_running_requests=true")["success"]:
            raise RuntimeError(f"{server.url} kept keys and values of the old weights.")
        server.call("/resume")

    def _release(self, server: Server) -> None:
        """Ends a broken update and resumes the paused completions."""
        abort_update(server.control)
        server.call("/resume")

    def _send_adapter(self, policy: torch.nn.Module, version: int) -> tuple[int, int]:
        name, folder = self._adapter_name(version), self._folder / f"adapter-{version}"
        report = write_adapter(policy, folder, writes=self._rank == 0)
        if self._rank == 0:
            self._adapters.append((name, folder))
            self._each(self._ready(), partial(self._load_adapter, name=name, folder=folder))
            for old, path in self._adapters[:-2]:  # what was sampled from the last one may still be on its way
                body = {"lora_name": old}
                self._each(self._ready(), lambda server, body=body: server.call("/v1/unload_lora_adapter", body))
                shutil.rmtree(path, ignore_errors=True)
            del self._adapters[:-2]
        return report

    def _adapter_name(self, version: int) -> str:
        return f"{self._run}-{version}"

    def _load_adapter(self, server: Server, name: str, folder: Path) -> None:
        server.call("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})

    # ---- faults ------------------------------------------------------------------------------------------------------

    def _mark_lost(self, server: Server, life: int, error: Exception) -> None:
        """Marks the server as lost, unless it has come back since; its monitor restarts it."""
        with self._changed:
            if server.life == life and server.ready and not self._closing.is_set():
                logger.warning("a vLLM server is lost, and what was under way is sent again: %s", error)
                server.ready = False
                if server.process is not None:
                    server.kill()
            self._changed.notify_all()

    def _watch(self, server: Server) -> None:
        """The server's monitor: restarts it whenever it is lost."""
        while not self._closing.wait(POLL_SECONDS):
            if (server.ready and not server.ended()) or self._closing.is_set():
                continue
            server.ready = False
            try:
                self._bring_back(server)
                self._failure = None
            except ServerLostError:
                continue
            except Exception as error:
                self._failure = error
            with self._changed:
                self._changed.notify_all()

    def _bring_back(self, server: Server) -> None:
        """Starts the server again (or finds it alive), and sends it the present weights."""
        if server.process is not None:
            server.kill()  # what is left of it
            self._bring_up(server)
        else:
            server.call("/weight_info", timeout=5, method="GET")  # answered by the engine itself, unlike /health
        with self._weights_lock:  # not while a sync sends
            if self._rank != 0:
                self._check_current(server)
            else:
                if server.process is None:
                    self._connect(server)
                self._send_again(server)
            server.life += 1
            server.ready = True

    def _send_again(self, server: Server) -> None:
        """Sends the weights of the last sync, from the copy in host memory."""
        if not self._snapshot:
            server.call("/resume")
            return
        self._begin(server)
        for bucket in buckets(self._snapshot.items()):
            server.send(bucket)
        self._finish(server, 1 if self._setup.sends_adapter else self.weight_version)
        loaded = {model["id"] for model in server.models()}
        for name, folder in self._adapters:
            if name not in loaded:
                self._load_adapter(server, name, folder)

    def _check_current(self, server: Server) -> None:
        """Raise ServerLostError unless the server serves this run's present weights."""
        if self._setup.sends_adapter:
            current = self._adapter_name(self.weight_version) in {model["id"] for model in server.models()}
        else:
            label = server.call("/weight_info", timeout=5, method="GET")["weight_version"]
            current = label == f"{self._run}:{self.weight_version}"
        if not current:
            raise ServerLostError(f"{server.url} does not have the weights yet")

    def _wait_for(self, usable: Callable[[], list[Server]]) -> list[Server]:
        """The usable servers, as soon as there is one.

        Raises RuntimeError: none is ready for too long, or cannot be brought back, or the engine is closed.
        """
        with self._changed:
            deadline = time.monotonic() + self._config.server_timeout
            while not (found := usable()):
                if self._closing.is_set():
                    raise RuntimeError("the engine was closed while it sampled.")
                if self._ready():
                    deadline = time.monotonic() + self._config.server_timeout  # full, not lost
                elif error := self._failure:
                    raise RuntimeError(f"a vLLM server died and could not be brought back: {error}") from error
                elif time.monotonic() > deadline:
                    raise RuntimeError(
                        f"no vLLM server came back within {self._config.server_timeout:.0f} s (server_timeout)."
                    )
                self._changed.wait(1.0)
            return found

    # ---- sampling ----------------------------------------------------------------------------------------------------

    def sample(
        self,
        prompts: list[list[int]],
        *,
        n: int,
        sampling: Sampling,
        seed: int,
        prompt_numbers: list[int],
        arrived: Arrived | None = None,
    ) -> list[list[Completion]]:
        """Samples n completions of each prompt; see `engine.Engine.sample`.

        Raises ValueError: as the protocol says, or a prompt that does not fit; RuntimeError: before the first sync,
        when no server comes back, or one serves weights of somebody else.
        """
        if not self._has_weights:
            raise RuntimeError("the servers have no weights, or not all of them: call sync before sample.")
        self._setup.check(prompts, n, sampling, prompt_numbers, self.max_model_len)
        drawn = 1 if sampling.temperature == 0 else n

        def draw(place: int) -> list[Completion]:
            parameters = self._setup.sampling_parameters(sampling, drawn, seed, prompt_numbers[place])
            group = build_completions(self._setup.tokenizer, self._draw(prompts[place], parameters))
            return group * n if drawn < n else group

        if not prompts:
            return []
        threads = len(self._servers) * max(1, self._config.vllm_max_num_seqs // drawn)
        pool = ThreadPoolExecutor(min(len(prompts), threads))
        try:
            places = {pool.submit(draw, place): place for place in range(len(prompts))}
            for future in as_completed(places):
                group = future.result()
                if arrived is not None:
                    arrived(places[future], group)
            return [future.result() for future in places]
        finally:
            pool.shutdown(cancel_futures=True)

    def _draw(self, prompt: list[int], parameters: dict[str, Any]) -> list[tuple[list[int], list[float], str, int]]:
        """All completions of a prompt, from whichever server gives them."""
        count, losses = parameters["n"], 0
        while True:
            server = self._reserve(count)
            life, oldest = server.life, self.weight_version
            try:
                body = {"token_ids": prompt, "sampling_params": parameters}
                if self._setup.sends_adapter:
                    body["model"] = self._adapter_name(oldest)
                answer = server.call("/inference/v1/generate", body, timeout=self._config.request_timeout)
                choices = sorted(answer["choices"], key=lambda choice: choice["index"])
                if not self._has_weights:
                    raise ValueError("the servers' weights are incomplete: a sync failed while they sampled.")
                return [self._row(choice, oldest) for choice in choices]
            except (ServerLostError, RuntimeError) as error:
                # An adapter that a server started anew does not have yet; other refusals are mistakes of ours.
                if isinstance(error, RuntimeError) and "does not exist" not in str(error):
                    raise
                losses += 1
                if losses == _LOSSES:
                    raise RuntimeError(
                        f"the completions of one prompt were lost {losses} times; if no server dies, request_timeout "
                        f"({self._config.request_timeout:g} s) is too short. Last: {error}"
                    ) from error
                self._mark_lost(server, life, error)
            finally:
                with self._changed:
                    server.load -= count
                    self._changed.notify_all()

    def _reserve(self, count: int) -> Server:
        """The ready server with the fewest completions under way, as soon as one has room for `count`."""
        most = self._config.vllm_max_num_seqs
        with self._changed:
            free = self._wait_for(lambda: [s for s in self._ready() if s.load == 0 or s.load + count <= most])
            server = min(free, key=lambda candidate: candidate.load)
            server.load += count
            return server

    def _row(self, choice: dict, oldest: int) -> tuple[list[int], list[float], str, int]:
        labels = [span["version"] for span in choice["weight_versions"] or ()]
        if not labels or "default" in labels or choice["finish_reason"] not in ("stop", "length"):
            raise ServerLostError(f"a completion came from weights {labels}, and ended by {choice['finish_reason']!r}")
        own = [label.split(":") for label in labels]
        newest = 1 if self._setup.sends_adapter else self._announced
        lowest = 1 if self._setup.sends_adapter else oldest
        if any(run != self._run or int(version) > newest for run, version in own):
            raise RuntimeError(
                f"a server returned a completion of weight version {labels}, where {self._run}:{lowest} to {newest} "
                "was expected: something else than this run sends it weights."
            )
        if any(int(version) < lowest for _, version in own):
            raise ServerLostError(f"a completion came from weights {labels}, older than {lowest}")
        logprobs = [entry["logprob"] for entry in choice["logprobs"]["content"]]
        version = oldest if self._setup.sends_adapter else min(int(version) for _, version in own)
        return choice["token_ids"], logprobs, choice["finish_reason"], version

    def sleep(self) -> None:
        """Nothing to free: servers have memory of their own."""

    def close(self) -> None:
        """Ends the servers that this run started."""
        if self._closing.is_set():
            return
        self._closing.set()
        for server in self._servers:
            if server.process is not None:
                server.kill()
        for server in self._servers:
            try:
                server.transport.close()
            except Exception:
                logger.warning("a weight transfer could not be closed", exc_info=True)
        if self._rank == 0:
            shutil.rmtree(self._folder, ignore_errors=True)
        shutil.rmtree(self._setup.folder, ignore_errors=True)
        with self._changed:
            self._changed.notify_all()


def _own_address(url: str) -> str:
    """The address under which a server at `url` reaches this process."""
    host = urllib.parse.urlsplit(url).hostname or ""
    if host in ("127.0.0.1", "localhost"):
        return "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends nothing, only asks for the route
        probe.connect((host, 9))
        return probe.getsockname()[0]
