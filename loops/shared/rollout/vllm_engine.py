"""vLLM in the trainer's process: it gets the policy's weights in memory.

With several processes each has an engine of its own, or, with `vllm_tensor_parallel_size` above 1, as many neighbouring
ones share one and sample all their prompts together. The engine starts from the policy's config with random weights;
the first sync sends all of them, so it comes before the first sample.
"""

from __future__ import annotations

import atexit
import logging
import shutil
import threading
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from loops.shared.layers import unwrap
from loops.shared.rollout.config import Sampling
from loops.shared.rollout.engine import Arrived, Completion, SyncReport, build_completions
from loops.shared.rollout.vllm_setup import VllmSetup, one_sentence
from loops.shared.rollout.weight_transfer import Transport, abort_update, buckets, register, write_adapter
from loops.shared.weights import iter_weights


class VllmEngine:
    """The engine `vllm`. Calls from several threads wait for each other."""

    is_off_policy = True

    def __init__(self, setup: VllmSetup):
        """Starts vLLM; collective over all processes.

        Raises ValueError: vLLM does not fit the model, the memory or the number of processes.
        """
        self.weight_version = 0
        self._setup = setup
        self._lock = threading.RLock()
        self._asleep = False
        self._has_weights = False  # whether the last sync went through, and nothing has failed since
        self._base_sent = False
        self._lora: Any = None
        self._transport = Transport()
        self._sleeps = setup.device == "cuda" and setup.config.vllm_sleep
        self._group, self._rank_in_group = _tensor_parallel_group(setup.config.vllm_tensor_parallel_size)
        self._made_group = not torch.distributed.is_initialized()  # vLLM makes a default group where there is none
        self._llm = self._start()
        self.max_model_len = self._llm.model_config.max_model_len
        self._transport.connect(self._control, 1)
        atexit.register(self.close)
        self.sleep()  # no weights yet: SFT and DPO may train long before their first evaluation

    def _start(self) -> Any:
        import vllm.envs

        # vLLM reads these from the environment of the process, which is not ours to change; set on its module they win.
        vllm.envs.VLLM_ENABLE_V1_MULTIPROCESSING = False
        vllm.envs.VLLM_NO_USAGE_STATS = True
        vllm.envs.VLLM_CPU_OMP_THREADS_BIND = "nobind"
        from vllm import LLM
        from vllm.v1.executor.uniproc_executor import UniProcExecutor

        register()
        alone = not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1
        disabled = logging.root.manager.disable
        logging.disable(logging.WARNING)  # a page for each process
        try:
            with torch.random.fork_rng(), _eager():  # vLLM seeds the process
                return LLM(
                    **self._setup.arguments(shares_gpu=True),
                    skip_tokenizer_init=self._setup.tokenizer is None,
                    # By its class: a CPU would take several processes otherwise.
                    distributed_executor_backend=UniProcExecutor if alone else "external_launcher",
                    enable_sleep_mode=self._sleeps,
                )
        except Exception as error:
            sentence = one_sentence(str(error))
            if sentence is None:
                raise
            raise ValueError(sentence) from error
        finally:
            logging.disable(disabled)
            logging.getLogger("vllm").setLevel(logging.ERROR)

    def _control(self, method: str, **arguments: Any) -> None:
        getattr(self._llm, method)(arguments)

    def sync(self, policy: torch.nn.Module) -> SyncReport:
        """Loads the policy's weights, or its adapter, into vLLM; every process calls this.

        Raises ValueError: vLLM has no place for a tensor, or one is missing.
        """
        start = time.perf_counter()
        policy, setup = unwrap(policy), self._setup
        with self._lock, torch.no_grad():
            version, self._has_weights = self.weight_version + 1, False
            if self._asleep:
                self._llm.wake_up(tags=["weights"])
            tensors = size = 0
            if not setup.sends_adapter or not self._base_sent:
                tensors, size = self._send(policy)
                self._base_sent = True
            if setup.sends_adapter:
                count, adapter_bytes = self._send_adapter(policy, version)
                tensors, size = tensors + count, size + adapter_bytes
            if self._asleep:
                self._llm.wake_up(tags=["kv_cache"])
                self._asleep = False
            if not self._llm.reset_prefix_cache():
                raise RuntimeError("vLLM kept keys and values of the old weights (requests are running).")
            self._llm.update_weight_version(str(version))
            self.weight_version, self._has_weights = version, True
        return SyncReport(weight_version=version, tensors=tensors, bytes=size, seconds=time.perf_counter() - start)

    def _send(self, policy: torch.nn.Module) -> tuple[int, int]:
        """Sends all weights; those of the base alone where the adapter is sent by itself."""
        tensors = size = 0
        try:
            self._llm.start_weight_update()
            for bucket in buckets(iter_weights(policy, dtype=self._setup.dtype, adapter=not self._setup.sends_adapter)):
                self._transport.send(self._control, bucket)
                tensors, size = tensors + len(bucket), size + sum(tensor.nbytes for _, tensor in bucket)
            self._llm.finish_weight_update()
        except Exception as error:
            abort_update(self._control)
            if isinstance(error, ValueError | KeyError):
                raise ValueError(f"vLLM refused the policy's weights: {error}") from error
            raise
        return tensors, size

    def _send_adapter(self, policy: torch.nn.Module, version: int) -> tuple[int, int]:
        from vllm.lora.request import LoRARequest

        folder = self._setup.folder / f"adapter-{version}"
        report = write_adapter(policy, folder, writes=True)
        lora = LoRARequest(f"policy-{version}", version, str(folder))
        self._llm.llm_engine.add_lora(lora)
        if self._lora is not None:
            self._llm.llm_engine.remove_lora(self._lora.lora_int_id)
            shutil.rmtree(self._lora.lora_path, ignore_errors=True)
        self._lora = lora
        return report

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
        """Samples n completions of each prompt; see `engine.Engine.sample`. All arrive at once.

        Raises ValueError: as the protocol says, or a prompt that does not fit; RuntimeError: before the first sync, or
        when vLLM fails.
        """
        if not self._has_weights:
            raise RuntimeError("vLLM has no weights, or not all of them: call sync before sample.")
        self._setup.check(prompts, n, sampling, prompt_numbers, self.max_model_len)
        asked = [(prompt, number) for prompt, number in zip(prompts, prompt_numbers, strict=True)]
        shares = [asked]
        if self._group is not None:  # its processes sample everybody's prompts together
            shares = [[] for _ in range(self._setup.config.vllm_tensor_parallel_size)]
            torch.distributed.all_gather_object(shares, asked, group=self._group)
        everything = [pair for share in shares for pair in share]
        start = sum(len(share) for share in shares[: self._rank_in_group])
        if not everything:
            return []
        drawn = 1 if sampling.temperature == 0 else n
        with self._lock:
            outputs = self._generate(everything, drawn, sampling, seed)[start : start + len(asked)]
        rows = [self._row(output) for group in outputs for output in group]
        completions = iter(build_completions(self._setup.tokenizer, rows))
        groups = [[next(completions) for _ in range(drawn)] for _ in asked]
        return [group * n if drawn < n else group for group in groups]

    def _generate(self, asked: list[tuple[list[int], int]], n: int, sampling: Sampling, seed: int) -> list[list[Any]]:
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        parameters = []
        for _, number in asked:
            fields = self._setup.sampling_parameters(sampling, n, seed, number)
            if structured := fields.pop("structured_outputs", None):
                fields["structured_outputs"] = StructuredOutputsParams(**structured)
            parameters.append(SamplingParams(**fields))
        try:
            with _eager():
                outputs = self._llm.generate(
                    [{"prompt_token_ids": prompt} for prompt, _ in asked],
                    parameters,
                    use_tqdm=False,
                    lora_request=self._lora,
                )
        except Exception as error:
            # What is left in the scheduler would make the next call wait for it for ever.
            self._has_weights = False
            sentence = one_sentence(str(error))
            raise RuntimeError(sentence or f"vLLM failed while sampling: {error}") from error
        return [sorted(output.outputs, key=lambda completion: completion.index) for output in outputs]

    def _row(self, output: Any) -> tuple[list[int], list[float], str, int]:
        tokens = list(output.token_ids)
        versions = {int(span.version) for span in output.weight_versions or ()}
        if versions != {self.weight_version} or output.finish_reason not in ("stop", "length"):
            raise RuntimeError(
                f"vLLM returned a completion of weight version {sorted(versions)} that ended by "
                f"{output.finish_reason!r}; version {self.weight_version} was expected."
            )
        logprobs = [entry[token].logprob for entry, token in zip(output.logprobs, tokens, strict=True)]
        return tokens, logprobs, output.finish_reason, self.weight_version

    def sleep(self) -> None:
        """Frees the GPU memory until the next sync: weights are dropped (with an adapter, moved to the host)."""
        if self._sleeps and not self._asleep:
            with self._lock:
                self._llm.sleep(level=1 if self._setup.sends_adapter else 2)
                self._asleep, self._has_weights = True, False

    def close(self) -> None:
        """Ends vLLM, if that does not take the trainer's process group along: then it ends with the process."""
        if self._llm is not None and self._made_group:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None
        shutil.rmtree(self._setup.folder, ignore_errors=True)


def _eager() -> AbstractContextManager[Any]:
    """On a CPU vLLM would compile two small functions of its sampler for many seconds."""
    return nullcontext() if torch.cuda.is_available() else torch.compiler.set_stance("force_eager")


def _tensor_parallel_group(size: int) -> tuple[Any, int]:
    """The process group that shares an engine with this process, and the place in it; (None, 0) for one process."""
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if world % size:
        raise ValueError(
            f"vllm_tensor_parallel_size is {size}, which does not divide the run's {world} processes: change one."
        )
    if size == 1:
        return None, 0
    rank = torch.distributed.get_rank()
    groups = [torch.distributed.new_group(list(range(first, first + size))) for first in range(0, world, size)]
    return groups[rank // size], rank % size
