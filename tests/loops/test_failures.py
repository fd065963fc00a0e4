"""Guards, with real processes over gloo that are killed, stopped, slow or asked to end.

The scenarios mostly wait, so they all run at once, before the first test that looks at them. Deadlines are short here:
what is 40 s in a run is 3 to 5 s; GRACE and HURRIED are as in a run.
"""

import atexit
import ctypes
import importlib
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object

from loops.shared import failures
from loops.shared.failures import FiniteGuard, StopRequest, Watch, explain_out_of_memory, group_timeout
from loops.shared.tracking import leaf_values

# The ranks. Each runs one of these functions; what it prints goes to a file.


def steps(accelerator, watch, stop, *, slow_rank=None, work=lambda: time.sleep(0.05), number=10_000):
    """A loop's skeleton: work, then one exchange; obeys a stop that any rank was asked for."""
    for step in range(number):
        watch.set_phase(step, "the update")
        if accelerator.process_index == slow_rank and step == 20:
            print("slow", flush=True)
            work()
        else:
            time.sleep(0.05)
        watch.set_phase(step, "the step's sums")
        if max(gather_object([stop.requested])):
            print(f"stopped after step {step}", flush=True)
            watch.stop()
            raise SystemExit(143)
        if step == 20:
            print("running", flush=True)


def forever(accelerator, watch, stop):
    steps(accelerator, watch, stop)


def unnoticed(accelerator, watch, stop):
    """Rank 0 hangs where nothing tells it that rank 1 is gone, as in a collective on a GPU."""
    watch.set_phase(7, "all-reduce")
    while not all(peer.record for peer in watch._peers.values()):  # else it would be one that was never heard of
        time.sleep(0.05)
    print("running", flush=True)
    time.sleep(1000)


def slow_but_alive(accelerator, watch, stop):
    steps(accelerator, watch, stop, slow_rank=1, work=lambda: time.sleep(8), number=30)
    watch.stop()


def holds_the_interpreter(accelerator, watch, stop):
    """Code in C that never lets other Python threads run: this rank's heartbeat stops, its process does not."""
    steps(accelerator, watch, stop, slow_rank=1, work=lambda: ctypes.PyDLL(None).sleep(8), number=30)
    watch.stop()


def too_slow(accelerator, watch, stop):
    steps(accelerator, watch, stop, slow_rank=1, work=lambda: time.sleep(1000))


def fails(accelerator, watch, stop):
    def work():
        raise KeyError("no such column")

    steps(accelerator, watch, stop, slow_rank=1, work=work)


def waits_in_a_barrier(accelerator, watch, stop):
    if accelerator.process_index == 1:
        time.sleep(1000)
    print("running", flush=True)
    accelerator.wait_for_everyone()


def finishes(accelerator, watch, stop):
    """Rank 0, which keeps the store, leaves well before rank 1 does."""
    steps(accelerator, watch, stop, number=30)
    watch.stop()
    if accelerator.process_index == 1:
        time.sleep(8)
    print("done", flush=True)


def not_a_number(accelerator, watch, stop):
    rank = accelerator.process_index
    guard = FiniteGuard(accelerator, "skip", patience=2)
    for _ in range(2):
        guard.seen(torch.tensor(1.5), [10 * rank, 10 * rank + 1])
        guard.seen(torch.tensor(math.nan if rank else 2.5), [10 * rank + 2])
        try:
            print("may step:", guard.may_step(5, torch.tensor(math.nan)), guard.skipped, flush=True)
        except FloatingPointError as error:
            print("raised:", error, flush=True)
    guard.seen(torch.tensor(1.0), [rank])
    print(guard.explain(6, "the gradient's norm is inf"), flush=True)
    watch.stop()


def be_a_rank(target, rank, output, options):
    """What torchrun and a script do around a loop's main; rank 0 keeps the store, as without torchrun's own."""
    out = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    if options.pop("apart", False):  # as if the ranks were on different machines
        failures._PLACE = f"machine {rank}"
    code = 1
    try:
        torch.distributed.init_process_group(
            "gloo",
            store=join_store(rank, Path(output).with_name(Path(output).name.replace(f"-{rank}.txt", ".port"))),
            rank=rank,
            world_size=2,
            timeout=group_timeout(options.get("collective_timeout", 1800.0)),
        )
        accelerator = Accelerator(cpu=True)
        stop = StopRequest(verbose=rank == 0)
        stop.install()
        watch = Watch(accelerator, stop=stop, closers=[lambda: print("closed", flush=True)], **options)
        watch.start()
        target(accelerator, watch, stop)
        code = 0
    except SystemExit as error:
        code = error.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    atexit._run_exitfuncs()  # as Python does at the end of a script
    os._exit(code)


def join_store(rank, file):
    """A TCPStore on a port that nobody else can have taken meanwhile."""
    if rank == 0:
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        file.with_suffix(".new").write_text(str(store.port))
        file.with_suffix(".new").rename(file)
        return store
    while not file.exists():
        time.sleep(0.05)
    return torch.distributed.TCPStore("127.0.0.1", int(file.read_text()), is_master=False)


CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "accelerate", "tests.loops.test_failures"])


@dataclass
class Ended:
    """How a scenario ended: per rank its exit code, what it printed and the seconds after the event."""

    codes: list
    outputs: list[str]
    seconds: list[float]


class Ranks:
    """Two processes of one run."""

    def __init__(self, folder: Path, target, **options):
        name = f"{target.__name__}-{time.monotonic_ns()}"
        self.outputs = [folder / f"{name}-{rank}.txt" for rank in range(2)]
        self.processes = [
            CONTEXT.Process(target=be_a_rank, args=(target, rank, str(self.outputs[rank]), dict(options)))
            for rank in range(2)
        ]
        for process in self.processes:
            process.start()

    def wait_for(self, text: str, rank: int = 0) -> None:
        until = time.monotonic() + 120
        while not (self.outputs[rank].exists() and text in self.outputs[rank].read_text()):
            assert time.monotonic() < until, self.outputs[rank].read_text()
            time.sleep(0.05)

    def send(self, number: int, *ranks: int) -> None:
        for rank in ranks:
            os.kill(self.processes[rank].pid, number)

    def end(self, timeout: float = 60.0, keep: tuple[int, ...] = ()) -> Ended:
        """Wait until the ranks (but those in `keep`) have ended by themselves; what is left is killed."""
        began, seconds = time.monotonic(), [math.inf, math.inf]
        try:
            while time.monotonic() - began < timeout:
                for rank, process in enumerate(self.processes):
                    if seconds[rank] == math.inf and process.exitcode is not None:
                        seconds[rank] = time.monotonic() - began
                if all(seconds[rank] < math.inf for rank in range(2) if rank not in keep):
                    break  # by the same look: one that ended since then is to get its seconds too
                time.sleep(0.05)
            codes = [process.exitcode for process in self.processes]
        finally:
            for process in self.processes:
                if process.exitcode is None:
                    process.kill()
                process.join()
        return Ended(codes, [output.read_text() for output in self.outputs], seconds)


def killed(folder, *, victim, target=forever, **options):
    ranks = Ranks(folder, target, **options)
    ranks.wait_for("running", 1 - victim)
    ranks.send(signal.SIGKILL, victim)
    return ranks.end()


def halted(folder, *, victim, apart=False):
    ranks = Ranks(folder, forever, heartbeat_timeout=4.0, apart=apart)
    ranks.wait_for("running", 1 - victim)
    ranks.send(signal.SIGSTOP, victim)
    return ranks.end(keep=(victim,) if apart else ())


def suspended_together(folder):
    """Both stopped for twice the deadline, then both woken; asked to end a little later."""
    ranks = Ranks(folder, forever, heartbeat_timeout=3.0)
    ranks.wait_for("running")
    ranks.send(signal.SIGSTOP, 0, 1)
    time.sleep(6)
    ranks.send(signal.SIGCONT, 0, 1)
    time.sleep(2)
    ranks.send(signal.SIGTERM, 1)
    return ranks.end()


def asked_to_stop(folder):
    ranks = Ranks(folder, forever)
    ranks.wait_for("running")
    ranks.send(signal.SIGTERM, 1)
    return ranks.end()


def asked_to_stop_beside_the_dead(folder):
    """As torchrun does when a rank dies, but with nothing else that would tell of the death."""
    ranks = Ranks(folder, unnoticed, apart=True, heartbeat_timeout=1000.0)
    ranks.wait_for("running")
    ranks.wait_for("running", 1)
    time.sleep(2)
    ranks.send(signal.SIGKILL, 1)
    ranks.send(signal.SIGTERM, 0)
    return ranks.end()


def asked_twice(folder):
    """Inside a collective, where no handler of Python runs."""
    ranks = Ranks(folder, waits_in_a_barrier)
    ranks.wait_for("running")
    time.sleep(1)
    ranks.send(signal.SIGTERM, 0)
    ranks.wait_for("SIGTERM: stopping")
    ranks.send(signal.SIGTERM, 0)  # an echo, as from a launcher that passes on what the whole job was sent
    time.sleep(2.5)
    assert ranks.processes[0].is_alive()
    ranks.send(signal.SIGTERM, 0)
    return ranks.end(keep=(1,))


def left_alone(folder, target, **options):
    return Ranks(folder, target, **options).end()


SCENARIOS = {
    "killed rank 1": lambda folder: killed(folder, victim=1),
    "killed rank 0": lambda folder: killed(folder, victim=0),
    "killed unnoticed": lambda folder: killed(folder, victim=1, target=unnoticed),
    "killed elsewhere": lambda folder: killed(folder, victim=1, target=unnoticed, apart=True, heartbeat_timeout=5.0),
    "killed store elsewhere": lambda folder: killed(folder, victim=0, target=unnoticed, apart=True),
    "stopped rank 1": lambda folder: halted(folder, victim=1),
    "stopped rank 0": lambda folder: halted(folder, victim=0),
    "stopped store elsewhere": lambda folder: halted(folder, victim=0, apart=True),
    "suspended": suspended_together,
    "slow": lambda folder: left_alone(folder, slow_but_alive, heartbeat_timeout=3.0, notice=3.0),
    "holds the interpreter": lambda folder: left_alone(folder, holds_the_interpreter, heartbeat_timeout=3.0),
    "too slow": lambda folder: left_alone(folder, too_slow, collective_timeout=4.0),
    "fails": lambda folder: left_alone(folder, fails),
    "finishes": lambda folder: left_alone(folder, finishes, heartbeat_timeout=3.0),
    "asked": asked_to_stop,
    "asked beside the dead": asked_to_stop_beside_the_dead,
    "asked twice": asked_twice,
    "not a number": lambda folder: left_alone(folder, not_a_number),
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with ThreadPoolExecutor(len(SCENARIOS)) as pool:
        futures = {name: pool.submit(scenario, folder) for name, scenario in SCENARIOS.items()}
    return {name: future.result() for name, future in futures.items()}


@pytest.mark.parametrize("victim", [0, 1])  # rank 0 keeps the store
def test_a_killed_rank_ends_the_run_and_is_named(ended, victim):
    """gloo fails at once in the survivor; after its traceback one sentence says who and where."""
    result = ended[f"killed rank {victim}"]
    assert result.codes[1 - victim] == 1 and result.seconds[1 - victim] < 20
    text = result.outputs[1 - victim]
    assert f"cannot go on without rank {victim} (its process is gone" in text
    assert f"rank {1 - victim} at step" in text and "the step's sums" in text


def test_a_killed_rank_that_no_error_tells_of_ends_the_run(ended):
    result = ended["killed unnoticed"]
    assert result.codes[0] == 1 and result.seconds[0] < 20
    assert "rank 0 at step 7, all-reduce: cannot go on without rank 1 (its process is gone" in result.outputs[0]
    assert result.outputs[0].count("cannot go on") == 1
    assert "closed" in result.outputs[0]


def test_a_rank_killed_on_another_machine_ends_the_run_after_the_deadline(ended):
    result = ended["killed elsewhere"]
    assert result.codes[0] == 1 and result.seconds[0] < 20
    heard = re.search(r"cannot go on without rank 1 \(last heard (\d+) s ago", result.outputs[0])
    assert heard and 5 <= int(heard[1]) < 20  # its own count: the deadline is 5 s


def test_a_lost_store_ends_the_run(ended):
    result = ended["killed store elsewhere"]
    assert result.codes[1] == 1 and result.seconds[1] < 20
    assert "cannot go on without the store that rank 0 or its launcher keeps" in result.outputs[1]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_rank_ends_the_run_after_the_deadline(ended, victim):
    result = ended[f"stopped rank {victim}"]
    assert result.codes[1 - victim] == 1 and 1 < result.seconds[1 - victim] < 20
    assert result.codes[victim] == -signal.SIGKILL  # else the launcher would wait for it
    assert f"cannot go on without rank {victim} (its process is stopped; last heard" in result.outputs[1 - victim]


def test_a_store_that_does_not_answer_ends_the_run(ended):
    result = ended["stopped store elsewhere"]
    assert result.codes[1] == 1 and 1 < result.seconds[1] < 20
    assert "the store that rank 0 or its launcher keeps (without an answer for" in result.outputs[1]


def test_a_suspended_job_goes_on_when_it_is_woken(ended):
    result = ended["suspended"]
    assert result.codes == [143, 143]
    assert "cannot go on" not in "".join(result.outputs)


@pytest.mark.parametrize("name", ["slow", "holds the interpreter"])
def test_a_slow_rank_is_waited_for(ended, name):
    """8 s of work against a heartbeat deadline of 3 s."""
    result = ended[name]
    assert result.codes == [0, 0]
    assert "cannot go on" not in "".join(result.outputs)


def test_who_is_waited_for_is_said(ended):
    """Notices after 3 and 6 s of the 8, from one rank. (What a rank knows of another one is up to 2 s old.)"""
    notices = [line for line in ended["slow"].outputs[0].splitlines() if "has waited" in line]
    assert len(notices) == 2 and "has waited" not in ended["slow"].outputs[1]
    assert notices[1].startswith(
        "rank 0 at step 20, the step's sums, has waited 6 s for rank 1 (at step 20, the update"
    )


def test_a_rank_that_is_too_slow_ends_the_run(ended):
    result = ended["too slow"]
    assert result.codes[0] == 1
    assert "rank 1 (at step 20, the update, since" in result.outputs[0]
    assert "(collective_timeout); the run ends here." in result.outputs[0]


def test_a_rank_that_fails_is_named_with_its_error(ended):
    result = ended["fails"]
    assert result.codes == [1, 1]
    assert "KeyError" in result.outputs[1] and "cannot go on" not in result.outputs[1]
    assert "cannot go on without rank 1 (ended early (KeyError: 'no such column'); last heard" in result.outputs[0]
    assert "at step 20, the update)" in result.outputs[0]


def test_a_rank_that_finished_is_not_missed(ended):
    result = ended["finishes"]
    assert result.codes == [0, 0]
    assert all(output.strip().endswith("done") and "cannot" not in output for output in result.outputs)


def test_sigterm_to_one_rank_stops_all_after_the_same_step(ended):
    result = ended["asked"]
    assert result.codes == [143, 143] and max(result.seconds) < 20
    first, second = ([x for x in output.splitlines() if x.startswith("stopped after")] for output in result.outputs)
    assert first == second and len(first) == 1


def test_sigterm_beside_a_dead_rank_ends_within_seconds(ended):
    """The deadline is 1000 s, the rank died on another machine, nothing raises: after SIGTERM 6 s of silence do."""
    result = ended["asked beside the dead"]
    assert result.codes[0] == 143 and result.seconds[0] < 20
    assert "cannot go on without rank 1 (last heard" in result.outputs[0]


def test_a_second_sigterm_ends_at_once_even_inside_a_collective(ended):
    result = ended["asked twice"]
    assert result.codes[0] == 143 and result.seconds[0] < 8
    assert "without saving" in result.outputs[0]


def test_a_non_finite_gradient_names_rank_and_rows_and_all_ranks_skip_alike(ended):
    result = ended["not a number"]
    named = "step 5: the gradient's norm is nan; rank 1 has loss nan on rows 12"
    assert result.codes == [0, 0]
    for output in result.outputs:
        assert "may step: False 1" in output
        assert f"raised: {named}; that is 2 steps in a row, so the run has diverged." in output
        finite = "step 6: the gradient's norm is inf though every loss is finite; the step's rows: rank 0: 0; rank 1: 1"
        assert finite in output
    assert f"{named}; this step is skipped" in result.outputs[0]
    assert "skipped" not in result.outputs[1]


# In this process.


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(True)
    return Accelerator(cpu=True)


def test_alone_nothing_is_watched(accelerator):
    threads = threading.active_count()
    watch = Watch(accelerator)
    watch.start()
    watch.set_phase(1, "the update")
    assert threading.active_count() == threads
    watch.stop()


def test_the_groups_own_timeout_comes_later():
    assert group_timeout(1800.0) == timedelta(seconds=1860)


def test_sigterm_is_a_request_and_the_handler_is_put_back(capfd):
    former, former_fd = signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)
    stop = StopRequest()
    stop.install()
    try:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        until = time.monotonic() + 120
        while "another SIGTERM" not in capfd.readouterr().err:
            assert time.monotonic() < until
            time.sleep(0.05)
        assert stop.requested
    finally:
        stop.remove()
    assert signal.getsignal(signal.SIGTERM) == former and signal.set_wakeup_fd(former_fd) == -1


def test_outside_the_main_thread_nothing_is_installed():
    former = signal.getsignal(signal.SIGTERM)
    stop = StopRequest()
    thread = threading.Thread(target=stop.install)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == former and not stop.requested


def terminate_a_forked_worker(queue):
    stop = StopRequest(verbose=False)
    stop.install()
    ends = set()
    for pause in (0.0, 0.0, 0.0, 0.2):  # also before the child has run a line of its own
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(1000,))
        worker.start()
        time.sleep(pause)
        worker.terminate()
        worker.join(10)
        ends.add(worker.exitcode)
    time.sleep(0.2)
    queue.put((ends, stop.requested))


def test_a_forked_worker_ends_on_sigterm_as_ever():
    """A pool's or a data loader's worker; and its signal is no request to this process."""
    queue = CONTEXT.SimpleQueue()
    process = CONTEXT.Process(target=terminate_a_forked_worker, args=(queue,))
    process.start()
    assert queue.get() == ({-signal.SIGTERM}, False)
    process.join()


def leave_a_child_behind(queue):
    if os.fork() == 0:
        stop = StopRequest(verbose=False, follow_parent=True)
        stop.install()
        queue.put("installed")
        until = time.monotonic() + 120
        while not stop.requested and time.monotonic() < until:
            time.sleep(0.05)
        queue.put(stop.requested)
        os._exit(0)
    time.sleep(1)
    os._exit(0)


def test_the_death_of_the_launcher_is_a_request():
    """`accelerate launch` of one process ends on SIGTERM and leaves the loop alone."""
    queue = CONTEXT.SimpleQueue()
    process = CONTEXT.Process(target=leave_a_child_behind, args=(queue,))
    process.start()
    assert queue.get() == "installed" and process.is_alive()
    assert queue.get() is True
    process.join()


class NeverRead(torch.Tensor):
    """A loss that may not be looked at: reading it would wait for the GPU."""

    def __float__(self):
        raise AssertionError("a loss was read in the good case")


def test_in_the_good_case_no_loss_is_read(accelerator):
    guard = FiniteGuard(accelerator)
    for step in range(3):
        guard.seen(torch.tensor(1.0).as_subclass(NeverRead), [step])
        assert guard.may_step(step, torch.tensor(0.7))
    assert guard.skipped == 0


def test_stop_raises_with_step_and_rows(accelerator):
    """Rows of an earlier step are not named."""
    guard = FiniteGuard(accelerator, "stop")
    guard.seen(torch.tensor(1.0), [1, 2])
    assert guard.may_step(8, 1.0)
    guard.seen(torch.tensor(1.0), [3, 4])
    guard.seen(torch.tensor(math.inf), [5, 6])
    with pytest.raises(FloatingPointError, match="step 9: .* norm is inf; rank 0 has loss inf on rows 5, 6; nothing"):
        guard.may_step(9, math.inf)


def test_an_unknown_answer_to_what_is_not_finite_is_refused(accelerator):
    with pytest.raises(ValueError, match="on_non_finite is 'ignore'; give stop or skip."):
        FiniteGuard(accelerator, "ignore")


def test_a_finite_step_between_resets_the_patience(accelerator, capsys):
    guard = FiniteGuard(accelerator, "skip", patience=2)
    assert [guard.may_step(i, norm) for i, norm in enumerate([math.nan, 1.0, math.nan, 1.0])] == [False, True] * 2
    assert guard.skipped == 2
    with pytest.raises(FloatingPointError, match="2 steps in a row"):
        guard.may_step(4, math.nan), guard.may_step(5, math.nan)


# Out of memory.


ERROR = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.1 GiB of which 1 GiB is free."
)


def settings_of(loop: str) -> dict:
    """A loop's config with its defaults; imported here, since the ranks above have no use for the loops."""
    return asdict(importlib.import_module(f"loops.{loop}").Config())


def order(text: str, *keys: str) -> bool:
    places = [text.find(f". {key}: ") for key in keys]
    return -1 not in places and places == sorted(places)


def test_out_of_memory_in_training_says_what_to_change_in_which_order():
    settings = {
        "model": {"gradient_checkpointing": False, "lora_r": 0, "load_in_4bit": False},
        "batch": {"max_tokens_per_batch": 16384, "per_device_train_batch_size": 8},
        "encode": {"max_seq_length": 2048},
        "run": {"fsdp": {}, "cpu_offload": False},
    }
    text = explain_out_of_memory(ERROR, leaf_values(settings), num_processes=8)
    keys = ("max_tokens_per_batch", "gradient_checkpointing", "fsdp", "lora_r", "load_in_4bit", "max_seq_length")
    assert order(text, *keys)
    assert "1. max_tokens_per_batch: 8192 (now 16384)" in text and "gradient_checkpointing: true (now false" in text
    assert "while training (CUDA out of memory. Tried to allocate 2.00 GiB)" in text
    assert "per_device_train_batch_size" not in text  # the token budget decides
    assert "cpu_offload" not in text  # nothing is sharded
    assert "\n" not in text


def test_without_a_token_budget_smaller_micro_batches_keep_the_steps_rows():
    settings = {
        "batch": {"max_tokens_per_batch": 0, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 3}
    }
    text = explain_out_of_memory(ERROR, leaf_values(settings))
    assert "1. per_device_train_batch_size: 4 (now 8), 2. gradient_accumulation_steps: 6 (now 3" in text


def test_out_of_memory_while_sampling_starts_with_the_rollout():
    settings = settings_of("grpo")
    settings["rollout"] |= {"max_decode_batch": 64, "max_completion_length": 512}
    text = explain_out_of_memory(ERROR, leaf_values(settings), place="sampling")
    assert "while sampling" in text and "1. max_decode_batch: 32 (now 64" in text
    assert "max_completion_length: 256 (now 512)" in text and "gradient_checkpointing" not in text
    settings["rollout"]["vllm_gpu_memory_utilization"] = 0.9
    text = explain_out_of_memory(ERROR, leaf_values(settings), place="sampling")
    assert "1. vllm_gpu_memory_utilization: 0.8 (now 0.9)" in text


def test_out_of_memory_while_reading_weights_talks_of_weights():
    settings = settings_of("sft")
    text = explain_out_of_memory(ERROR, leaf_values(settings), place="reading the weights")
    assert "reading the weights" in text and "load_in_4bit" in text
    assert "batch_size" not in text and "max_seq_length" not in text


def test_what_is_set_already_is_not_advised():
    settings = {
        "model": {"gradient_checkpointing": True, "lora_r": 8, "load_in_4bit": True},
        "batch": {"max_tokens_per_batch": 0, "per_device_train_batch_size": 1},
    }
    text = explain_out_of_memory(ERROR, leaf_values(settings))
    assert text.endswith("; nothing is left to save: take more or larger GPUs.")


@pytest.mark.parametrize("loop", ["sft", "dpo", "grpo"])
@pytest.mark.parametrize("place", ["training", "sampling", "reading the weights"])
def test_only_settings_that_exist_are_advised(loop, place):
    settings = settings_of(loop)
    known = {key for value in settings.values() if isinstance(value, dict) for key in value} | set(settings)
    text = explain_out_of_memory(ERROR, leaf_values(settings), place=place, num_processes=2)
    advised = [part.split(":")[0].split(". ")[1] for part in text.split("in this order: ")[1].split("), ")]
    assert advised and set(advised) <= known


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_real_out_of_memory_is_explained():
    try:
        torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
    except torch.OutOfMemoryError as error:
        text = explain_out_of_memory(error, leaf_values(settings_of("sft")))
    assert "Tried to allocate" in text and "gradient_checkpointing: true" in text
