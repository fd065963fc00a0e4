"""Failures that would hang a run or go unnoticed: SIGTERM, dead ranks, non-finite gradients, memory that ran out."""

from __future__ import annotations

import atexit
import json
import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator

TERMINATED = 128 + signal.SIGTERM  # exit code of a process that SIGTERM ended
HURRIED = 6.0  # seconds of silence that are enough once this process itself is asked to end
GRACE = 4.0  # seconds left to the main thread, which often gets an error itself when a rank is gone
CLOSING = 5.0  # seconds that servers and trackers get to end when the process cannot go on
ECHO = 2.0  # seconds within which a second SIGTERM counts as the first one, passed on by the launcher
POLL = 0.5  # seconds between two looks


def end_process(sentence: str, code: int, closers: Sequence[Callable[[], object]] = ()) -> None:
    """Print `sentence`, call `closers` (5 seconds in total at most), exit; works from any thread."""

    def close() -> None:
        for closer in closers:
            try:
                closer()
            except Exception as error:  # the next one still has to be called
                os.write(2, f"while ending: {type(error).__name__}: {error}\n".encode())
        sys.stdout.flush()

    os.write(2, (sentence + "\n").encode())  # not through sys.stderr, whose lock a blocked thread may hold
    thread = threading.Thread(target=close, daemon=True)
    thread.start()
    thread.join(CLOSING)
    os._exit(code)


class StopRequest:
    """Graceful shutdown: SIGTERM sets `requested`; a second SIGTERM ends the process at once (exit code 143).

    The ranks must stop after the same step: put `float(stop.requested)` under a name that ends in `_max` into sums that
    are reduced anyway, and obey the reduced number. A signal is noticed even while the main thread is inside a
    collective, where Python runs no signal handler. Ctrl-C stays KeyboardInterrupt.
    """

    def __init__(self, *, verbose: bool = True, follow_parent: bool = False) -> None:
        """verbose: print a line when the signal comes (one rank should). follow_parent: the death of the process that
        started this one counts as a SIGTERM, because `accelerate launch` of one process passes no signal on."""
        self.closers: list[Callable[[], object]] = []  # called before a second signal ends the process
        self._requested = threading.Event()
        self._verbose = verbose
        self._parent = os.getppid() if follow_parent else None
        self._installed = False

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop; other ranks may not have been."""
        return self._requested.is_set()

    def install(self) -> None:
        """Take SIGTERM over until `remove`. Does nothing outside the main thread, where Python allows no handlers."""
        if self._installed or threading.current_thread() is not threading.main_thread():
            return
        self._installed = True
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._previous = signal.signal(signal.SIGTERM, lambda number, frame: self._requested.set())
        self._previous_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        hold, free = partial(self._mask, signal.SIG_BLOCK), partial(self._mask, signal.SIG_UNBLOCK)
        os.register_at_fork(before=hold, after_in_parent=free, after_in_child=self._in_child)  # cannot be undone
        threading.Thread(target=self._listen, args=(self._reader,), daemon=True).start()

    def remove(self) -> None:
        """Put the former handler back."""
        if self._installed:
            self._installed = False
            signal.set_wakeup_fd(self._previous_fd)
            signal.signal(signal.SIGTERM, self._previous or signal.SIG_DFL)  # None: it was not set from Python
            self._writer.close()  # ends the listener

    def _mask(self, how: int) -> None:
        if self._installed:
            signal.pthread_sigmask(how, {signal.SIGTERM})

    def _in_child(self) -> None:
        """In a forked worker SIGTERM ends the process, and does not reach this one."""
        if self._installed:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            self._mask(signal.SIG_UNBLOCK)  # one that came since the fork acts now
            self._installed = False

    def _listen(self, reader: socket.socket) -> None:
        """Receive the signals, also while Python's handler has to wait for the main thread."""
        reader.settimeout(POLL)
        first, printed = 0.0, False  # time of the first SIGTERM
        while True:
            try:
                received = reader.recv(64)  # one byte per signal: its number
                if not received:
                    return reader.close()
                if signal.SIGTERM in received:
                    first = first or time.monotonic()
                    if time.monotonic() - first > ECHO:
                        end_process("a second SIGTERM: ending at once, without saving", TERMINATED, self.closers)
            except TimeoutError:
                pass  # nothing came: look at the parent
            orphaned = self._parent is not None and os.getppid() != self._parent
            if first or orphaned:
                self._requested.set()
            if self.requested and self._verbose and not printed:
                printed = True
                reason = "the process that started this one is gone" if orphaned and not first else "SIGTERM"
                os.write(2, f"{reason}: stopping after this step; another SIGTERM ends the run at once\n".encode())


def group_timeout(collective_timeout: float) -> timedelta:
    """The process group's own timeout, for `InitProcessGroupKwargs`: later than that of `Watch`."""
    return timedelta(seconds=collective_timeout + 60)


class Watch:
    """Ends this process, with one sentence that names the rank and its phase, when it waits for a rank in vain.

    One thread writes this rank's phase to the process group's store, once per second, and reads those of the others;
    it goes on while the main thread computes or waits. Another thread decides:

    - a rank whose process is gone, or that ended early, ends the run within seconds;
    - a rank that was not heard of for `heartbeat_timeout` seconds ends it then; after a SIGTERM 6 seconds are enough;
    - a rank that lives but is behind is waited for, with a notice every now and then, for `collective_timeout` seconds.

    Only seconds during which this process itself ran count: a suspended job goes on when it is resumed.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        *,
        heartbeat_timeout: float = 40.0,
        collective_timeout: float = 1800.0,
        notice: float = 60.0,
        stop: StopRequest | None = None,
        closers: Sequence[Callable[[], object]] = (),
    ) -> None:
        """All times in seconds. closers: called before the process is ended (child servers, trackers)."""
        self.rank, self.size = accelerator.process_index, accelerator.num_processes
        self.closers = list(closers)
        self._heartbeat_timeout, self._collective_timeout = heartbeat_timeout, collective_timeout
        self._notice, self._stop = notice, stop
        self._running, self._wake, self._lock = False, threading.Event(), threading.Lock()
        self._phase = (0, 0, "starting", time.monotonic())  # number of phases before, step, phase, since when
        self._state = "running"  # or "finished", or how it ended early
        self._peers = {rank: _Peer(rank) for rank in range(self.size) if rank != self.rank}
        self._pause = max(1.0, self.size / 64)  # between two beats; the store answers size x size records in this time
        self._unanswered, self._store_error = 0.0, ""  # seconds since the store last answered

    def start(self) -> None:
        """Begin; on every rank, right after the process group exists. With one process nothing happens."""
        if self.size == 1 or self._running:
            return
        from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

        shared: Any = _get_default_store()  # the main thread may hold its connection: take another one
        self._store = PrefixStore("watch", shared.clone())
        self._store.set_timeout(timedelta(seconds=self._collective_timeout))
        for rank, (place, pid) in enumerate(gather_object([(_PLACE, os.getpid())])):
            if rank != self.rank and place == _PLACE is not None:
                self._peers[rank].pid = pid
        self._running = True
        self._beating = threading.Thread(target=self._beat, daemon=True)
        self._beating.start()
        threading.Thread(target=self._judge, daemon=True).start()
        self._previous_hook, sys.excepthook = sys.excepthook, self._on_error
        atexit.register(self._leave, "ended early (its own error is above)")

    def set_phase(self, step: int, phase: str) -> None:
        """Record the phase of this process. Every rank must make the same calls; they cost nothing."""
        self._phase = (self._phase[0] + 1, step, phase, time.monotonic())

    def stop(self) -> None:
        """End well: from here on this process may be silent. Call it after the last exchange, on every rank."""
        if self._running:
            sys.excepthook = self._previous_hook
            atexit.unregister(self._leave)
            self._leave("finished")

    def _leave(self, state: str) -> None:
        self._state = state if self._state == "running" else self._state
        self._running = False
        self._wake.set()
        self._beating.join(2.0)  # it tells the others

    def _on_error(self, kind: type[BaseException], error: BaseException, trace: Any) -> None:
        """Print the error's traceback and, if it came from a missing rank, the sentence that names the rank."""
        self._previous_hook(kind, error, trace)
        self._state = f"ended early ({traceback.format_exception_only(kind, error)[-1].strip()[:200]})"
        self._wake.set()
        until = time.monotonic() + GRACE
        while issubclass(kind, RuntimeError) and self._running and time.monotonic() < until:  # as torch's all are
            time.sleep(0.2)
            with self._lock:
                for peer in self._peers.values():
                    peer.look(0.2)
            if missing := self._missing(silence=2.5 * self._pause, grace=0.0):
                os.write(2, (self._sentence(missing) + "\n").encode())
                break

    def _beat(self) -> None:
        """Talk to the store; the only thread that does, since the store may be what does not answer."""
        while True:
            ending = not self._running
            before, step, phase, since = self._phase
            record = {"before": before, "step": step, "phase": phase, "state": self._state}
            record["since"] = time.monotonic() - since  # differs with every beat
            try:
                self._store.set(str(self.rank), json.dumps(record))
                if ending:
                    return
                known = [peer for peer in self._peers.values() if peer.record or self._store.check([str(peer.rank)])]
                texts = self._store.multi_get([str(peer.rank) for peer in known]) if known else []
            except RuntimeError as error:  # torch's name for a lost connection
                self._store_error = str(error).splitlines()[0]
                return
            with self._lock:
                self._unanswered = 0.0
                for peer, text in zip(known, texts, strict=True):
                    record = json.loads(text)
                    if record != peer.record:
                        peer.record, peer.silent = record, 0.0
            self._wake.wait(self._pause)
            self._wake.clear()

    def _judge(self) -> None:
        """Look at the others twice per second; end the process, or print whom it waits for."""
        before, waited, notice, last = -1, 0.0, self._notice, time.monotonic()
        while self._running:
            time.sleep(POLL)
            now = time.monotonic()
            passed, last = min(now - last, 2 * POLL), now  # less where this process itself was stopped
            if self._phase[0] != before:
                before, waited, notice = self._phase[0], 0.0, self._notice
            waited += passed
            with self._lock:
                self._unanswered += passed
                for peer in self._peers.values():
                    peer.look(passed)
                behind = [peer for peer in self._peers.values() if peer.before < before and peer.state == "running"]
            hurried = self._stop is not None and self._stop.requested
            silence = min(HURRIED, self._heartbeat_timeout) if hurried else self._heartbeat_timeout
            missing = self._missing(silence, GRACE)
            if not missing and waited > self._collective_timeout:
                missing = [f"{peer.describe()}, waited for {waited:.0f} s (collective_timeout)" for peer in behind]
            if missing and self._running:
                for peer in self._peers.values():
                    if peer.process == "T" and peer.silent > silence:  # it takes no other signal while it is stopped,
                        with suppress(ProcessLookupError):  # and the launcher would wait half a minute for it
                            os.kill(peer.pid, signal.SIGKILL)  # type: ignore[arg-type]
                end_process(self._sentence(missing), TERMINATED if hurried else 1, self.closers)
            first = all(rank in [peer.rank for peer in behind] for rank in range(self.rank))  # one rank prints
            if behind and first and waited > notice:
                notice *= 2
                who = "; ".join(peer.describe() for peer in behind)
                os.write(2, f"{self._here()}, has waited {waited:.0f} s for {who}\n".encode())

    def _missing(self, silence: float, grace: float) -> list[str]:
        """The ranks that will not come; or the store, without which nobody's silence means anything."""
        with self._lock:
            stalled = bool(self._store_error) or self._unanswered > 3 * self._pause
            peers = [peer for peer in self._peers.values() if peer.is_missing(math.inf if stalled else silence, grace)]
            if not peers and stalled and self._unanswered > (grace if self._store_error else silence):
                peers = [peer for peer in self._peers.values() if peer.process == "T"]
                if not peers:
                    error = f": {self._store_error}" if self._store_error else ""
                    silent = f"without an answer for {self._unanswered:.0f} s{error}"
                    return [f"the store that rank 0 or its launcher keeps ({silent})"]
            return [peer.describe() for peer in peers]

    def _here(self) -> str:
        return f"rank {self.rank} at step {self._phase[1]}, {self._phase[2]}"

    def _sentence(self, missing: list[str]) -> str:
        return f"{self._here()}: cannot go on without {'; '.join(missing)}; the run ends here."


@dataclass
class _Peer:
    """What this process knows of another rank."""

    rank: int
    pid: int | None = None  # where its process can be seen from here
    process: str = ""  # state letter of that process, or gone
    record: dict[str, Any] = field(default_factory=dict)  # the newest that it wrote to the store
    silent: float = 0.0  # seconds without news
    over: float = 0.0  # seconds since its process was seen gone, or it wrote that it ended early

    @property
    def state(self) -> str:
        return self.record.get("state", "running")

    @property
    def before(self) -> int:
        return self.record.get("before", -1)

    @property
    def gone(self) -> bool:
        return self.process in ("gone", "Z", "X") and self.state == "running"

    def look(self, passed: float) -> None:
        """Look at its process, if it runs on this machine; `passed` seconds after the last look."""
        if self.pid is not None:
            self.process = _process_state(self.pid)
        self.silent += passed
        self.over = self.over + passed if self.gone or self.state.startswith("ended") else 0.0

    def is_missing(self, silence: float, grace: float) -> bool:
        """Whether it will not come: ended, gone, or silent for `silence` seconds though not seen alive."""
        computes = self.process in ("R", "S", "D", "t")  # but keeps Python's lock, or a debugger (t) looks at it
        return self.state != "finished" and (self.over > grace or (self.silent > silence and not computes))

    def describe(self) -> str:
        """Who, where and since when."""
        seen = "its process is stopped" if self.process == "T" else "its process is gone" if self.gone else ""
        ended = self.state if self.state != "running" else seen
        if not self.record:
            return f"rank {self.rank} ({ended + '; ' if ended else ''}never heard of)"
        place = f"step {self.record['step']}, {self.record['phase']}"
        if self.silent < 3 and not ended:
            return f"rank {self.rank} (at {place}, since {self.record['since'] + self.silent:.0f} s)"
        return f"rank {self.rank} ({ended + '; ' if ended else ''}last heard {self.silent:.0f} s ago at {place})"


def _place() -> str | None:
    """Names the machine and its process numbers: two ranks see each other's processes only where it is the same."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return None  # outside Linux


_PLACE = _place()


def _process_state(pid: int) -> str:
    """R, S or D for a process that lives, t in a debugger, T stopped, Z dead but not yet collected, or `gone`."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "gone"
    except OSError:
        return ""  # not for us to see


class FiniteGuard:
    """Keeps non-finite gradients (NaN or inf) out of the weights, and names the rows that they came from.

    The good case costs one look at the gradient's norm, a number that the step computes anyway and that is the same on
    every rank, so all decide alike. The micro-batches' losses stay on the device and are read only in the bad case.
    """

    def __init__(self, accelerator: Accelerator, on_non_finite: str = "stop", *, patience: int = 10) -> None:
        """on_non_finite: `stop` the run, or `skip` the optimizer step; `patience` such steps in a row stop it too."""
        if on_non_finite not in ("stop", "skip"):
            raise ValueError(f"on_non_finite is {on_non_finite!r}; give stop or skip.")
        self.skipped = 0  # optimizer steps, since this process started
        self._accelerator, self._on_non_finite, self._patience = accelerator, on_non_finite, patience
        self._in_a_row = 0
        self._seen: list[tuple[Tensor, Sequence[int]]] = []
        self._complete = False

    def seen(self, loss: Tensor, rows: Sequence[int]) -> None:
        """Remember a micro-batch of the present step: its loss (scalar, detached here) and its rows' ids."""
        if self._complete:
            self._seen, self._complete = [], False
        self._seen.append((loss.detach(), rows))

    def may_step(self, step: int, grad_norm: Tensor | float) -> bool:
        """Whether the optimizer may step. Raises FloatingPointError, on every rank, where the run is to stop.

        step: number for the message; grad_norm: global norm before clipping, equal on every rank.
        """
        self._complete = True
        norm = float(grad_norm)
        if math.isfinite(norm):
            self._in_a_row = 0
            return True
        sentence = self.explain(step, f"the gradient's norm is {norm}")
        if self._on_non_finite == "stop":
            raise FloatingPointError(f"{sentence}; nothing was updated (on_non_finite: skip leaves such steps out).")
        self.skipped, self._in_a_row = self.skipped + 1, self._in_a_row + 1
        if self._in_a_row >= self._patience:
            raise FloatingPointError(f"{sentence}; that is {self._in_a_row} steps in a row, so the run has diverged.")
        if self._accelerator.is_main_process:
            print(f"{sentence}; this step is skipped", file=sys.stderr, flush=True)
        return False

    def explain(self, step: int, what: str) -> str:
        """The sentence that names step, ranks and rows; every rank must call it, since it gathers them."""
        mine = [(float(loss), list(rows)) for loss, rows in self._seen]
        everywhere = gather_object([mine])  # [ranks][micro-batches] of (loss, rows)
        bad = [
            f"rank {rank} has loss {loss} on rows {_shown(rows)}"
            for rank, micro in enumerate(everywhere)
            for loss, rows in micro
            if not math.isfinite(loss)
        ]
        if bad:
            return f"step {step}: {what}; {'; '.join(bad)}"
        rows = [f"rank {rank}: {_shown(sum((r for _, r in micro), []))}" for rank, micro in enumerate(everywhere)]
        return f"step {step}: {what} though every loss is finite; the step's rows: {'; '.join(rows)}"


def _shown(rows: Sequence[int]) -> str:
    more = f" and {len(rows) - 64} more" if len(rows) > 64 else ""
    return ", ".join(map(str, rows[:64])) + more


def explain_out_of_memory(
    error: torch.OutOfMemoryError, values: Mapping[str, Any], *, place: str = "training", num_processes: int = 1
) -> str:
    """Which settings to change; those that leave the result as it is come first.

    values: this run's settings by name. place: "reading the weights", "sampling" or "training".
    """
    now = values.get

    def half(key: str, least: int = 1) -> int:
        value = (now(key) or 0) // 2
        return value if value >= least else 0

    changes: list[tuple[str, object]] = []  # setting, new value (empty: no change)
    if place == "sampling":
        share, decoded = now("vllm_gpu_memory_utilization") or 0, now("max_decode_batch")
        changes += [("vllm_gpu_memory_utilization", round(share - 0.1, 2) if share > 0.3 else 0)]
        changes += [("max_decode_batch", half("max_decode_batch") if decoded else 16)]  # 0: all at once
        changes += [("prefill_token_budget", half("prefill_token_budget", 2048))]
    elif place == "training":
        rows = 0 if now("max_tokens_per_batch") else half("per_device_train_batch_size")
        steps = 2 * (now("gradient_accumulation_steps") or 1) if rows and not now("train_batch_size") else 0
        changes += [("max_tokens_per_batch", half("max_tokens_per_batch", 1024))]
        changes += [("per_device_train_batch_size", rows), ("gradient_accumulation_steps", steps)]
        changes += [(key, "" if now(key) else "true") for key in ("gradient_checkpointing", "activation_offloading")]
    changes += [("fsdp", "full_shard" if num_processes > 1 and not now("fsdp") else "")]
    changes += [("lora_r", 32 if now("lora_r") == 0 else 0)]
    changes += [("load_in_4bit", "" if now("load_in_4bit") or now("load_in_8bit") else "true")]
    changes += [("cpu_offload", "true" if now("fsdp") and not now("cpu_offload") else "")]
    if place != "reading the weights":
        changes += [("max_completion_length", half("max_completion_length", 64))]
        changes += [("max_seq_length", half("max_seq_length", 256))]
    listed = [f"{key}: {value} (now {str(now(key)).lower()})" for key, value in changes if value and key in values]
    numbered = ", ".join(f"{number}. {change}" for number, change in enumerate(listed, 1))
    first = str(error).split(". GPU")[0].split("\n")[0].rstrip(".")
    todo = f"change, in this order: {numbered}" if listed else "nothing is left to save: take more or larger GPUs"
    return f"out of GPU memory while {place} ({first}); {todo}."
