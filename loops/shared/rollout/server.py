"""One vLLM server: its process, and requests to it over HTTP."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

from loops.shared.rollout.vllm_setup import one_sentence
from loops.shared.rollout.weight_transfer import Bucket, Transport

POLL_SECONDS = 0.2
_LAUNCHER = Path(__file__).resolve().parents[3] / "launch" / "vllm_server.py"
# Straight to the server: a proxy that the machine is set up with is for the world outside.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ServerLostError(Exception):
    """The server does not answer, not in time, or not with what it was told to serve: ask again, or elsewhere."""


class Server:
    """One server as this process sees it."""

    def __init__(self, number: int, url: str, transport: Transport, timeout: float, api_key: str | None = None):
        """transport: how it takes weights from rank 0. timeout: seconds for an answer, where a call does not say."""
        self.number, self.url, self.transport, self.timeout = number, url.rstrip("/"), transport, timeout
        self.ready = False
        self.load = 0  # completions under way
        self.process: subprocess.Popen | None = None
        self.life = 0  # how often it came back
        self.log = Path()
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def call(self, path: str, body: dict | None = None, *, timeout: float = 0, method: str = "POST") -> Any:
        """The answer to one request.

        Raises:
            ServerLostError: no answer, or the engine behind the server has died.
            RuntimeError: the server refused; its own words.
        """
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(self.url + path, data, self._headers, method=method)
        try:
            with _OPENER.open(request, timeout=timeout or self.timeout) as answer:
                text = answer.read().decode()
                return json.loads(text) if text[:1] in ("{", "[") else text
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            if error.code in (502, 503, 504) or "EngineDead" in text or "EngineCore encountered" in text:
                raise ServerLostError(f"{self.url}: {text[:200]}") from error
            if error.code == 401:
                raise ValueError(f"{self.url} asks for another key: set VLLM_API_KEY in the environment.") from error
            words = re.search(r'"(?:message|error)": ?"((?:[^"\\]|\\.)*)"', text)
            said = json.loads(f'"{words[1]}"') if words else text
            raise RuntimeError(f"{self.url}{path} answered {error.code}: {said[:500]}") from error
        except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
            raise ServerLostError(f"{self.url}{path}: {type(error).__name__} {error}") from error

    def control(self, method: str, **arguments: Any) -> None:
        """A call of the weight-update protocol."""
        self.call(f"/{method}", arguments or None)

    def models(self) -> list[dict]:
        """What it serves: its model, and the adapters on it."""
        return self.call("/v1/models", timeout=30, method="GET")["data"]

    def connect(self) -> None:
        """Connects its workers with this process, for the weights to come."""
        self.transport.connect(self.control, self.call("/get_world_size", timeout=30, method="GET")["world_size"])

    def send(self, bucket: Bucket) -> None:
        """Sends its workers these weights."""
        self.transport.send(self.control, bucket)

    def start(self, options: list[str], log: Path) -> None:
        """Starts the process; it ends with this one."""
        self.log = log
        host, port = self.url.removeprefix("http://").split(":")
        command = [sys.executable, str(_LAUNCHER), f"--parent={os.getpid()}", f"--host={host}", f"--port={port}"]
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [*command, *options],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=log.parent,  # vLLM must not find our packages in the working directory
                start_new_session=True,
            )

    def kill(self) -> None:
        """Ends the process and all that it started, at once."""
        self.ready = False
        if self.process is not None and self.process.returncode is None:  # once waited for, its number may be another's
            with suppress(ProcessLookupError):  # another thread was faster
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def ended(self) -> bool:
        """Whether a process of ours has ended. It is not waited for, so that `kill` still reaches what it started."""
        if self.process is None or self.process.returncode is not None:
            return self.process is not None
        try:
            return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:  # `kill` has just waited for it
            return True

    def wait_until_up(self, timeout: float) -> None:
        """Returns once the server answers.

        Raises:
            ServerLostError: it has not answered in time, or its port was taken meanwhile.
            ValueError, RuntimeError: it ended; why.
        """
        deadline = time.monotonic() + timeout
        while True:
            try:
                self.call("/health", timeout=5, method="GET")
                return
            except ServerLostError:
                if self.ended():
                    raise _why_it_ended(self.log.read_text(errors="replace"), self.log) from None
                if time.monotonic() > deadline:
                    raise ServerLostError(f"{self.url} does not answer for {timeout:.0f} s (server_timeout).") from None
                time.sleep(POLL_SECONDS)


def _why_it_ended(log: str, path: Path) -> Exception:
    """What a server's log says about its end; an end without an error, or for want of a port, is worth another try."""
    if sentence := one_sentence(log):
        return ValueError(sentence)
    errors = re.findall(r"^(?!.*WARNING).*\b(?:\w+Error|Exception|error): .+$", log, re.M)
    if not errors or "ddress already in use" in log:
        return ServerLostError(f"it ended while starting, killed or without its port (its log: {path})")
    return RuntimeError(f"a vLLM server ended while starting: {errors[-1].strip()[:300]} (its log: {path})")
