"""vLLM in the trainer's process: the policy's weights are handed over in memory.

With several processes each has an engine of its own, or, with `vllm_tensor_parallel_size` above 1, as many neighbouring
ones share one and sample all their prompts together. The engine starts from the policy's config alone, with weights
that mean nothing; the first sync brings all of them, so it comes before the first sample.

What both vLLM engines need (model folder, sampling parameters, completions) stands here too.
"""

from __future__ import annotations

import atexit
import logging
import math
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from loops.shared.layers import base_model, unwrap
from loops.shared.models import stop_token_ids
from loops.shared.rollout.config import RolloutConfig, Sampling
from loops.shared.rollout.engine import Arrived, Completion, SyncReport, check_call
from loops.shared.rollout.masks import check_masks, structured_outputs
from loops.shared.rollout.sampling import noise_keys
from loops.shared.rollout.weight_transfer import (
    BACKEND,
    LORA_RANKS,
    Transport,
    buckets,
    give_up,
    register,
    unserved_adapter,
    write_adapter,
)
from loops.shared.weights import iter_weights, plain_class

logger = logging.getLogger(__name__)

GIB = 2**30
CPU_KV_CACHE_GIB = 0.25


class Served:
    """What a vLLM engine serves, as decided from the policy and the config: folder, dtype, adapter, stop tokens."""

    def __init__(
        self,
        config: RolloutConfig,
        policy: torch.nn.Module,
        tokenizer: Any,
        autocast: Callable[[], AbstractContextManager[Any]] | None,
    ):
        """Writes the policy's config and the tokenizer into a folder of its own, for vLLM to start from.

        Raises ValueError: weight_sync is `adapter` and vLLM cannot serve the policy's, or it cannot sample as asked.
        """
        from peft import PeftModel

        model = base_model(policy)
        self.config, self.tokenizer = config, tokenizer
        self.device = next(policy.parameters()).device.type
        self.dtype = _dtype(config, policy, autocast or nullcontext)
        reason = unserved_adapter(policy)
        if config.weight_sync == "adapter" and reason:
            raise ValueError(f"weight_sync is adapter, but {reason}: set weight_sync to full.")
        wanted = config.weight_sync == "adapter" or (config.weight_sync == "auto" and self.device != "cpu")
        self.adapter = wanted and reason is None
        self.lora_rank = 0
        if self.adapter:
            self.lora_rank = next(rank for rank in LORA_RANKS if rank >= policy.peft_config["default"].r)  # type: ignore[operator,union-attr]
        self.vocabulary = model.config.get_text_config().vocab_size
        self.stop_token_ids = {token for token in stop_token_ids(model, tokenizer) if token < self.vocabulary}
        self.check([], 1, config, [], 0)

        self.folder = Path(tempfile.mkdtemp(prefix="plumbline-"))
        atexit.register(shutil.rmtree, self.folder, ignore_errors=True)
        self.model_folder = self.folder / "model"
        shape = type(model.config).from_dict(model.config.to_dict())
        for key in ("quantization_config", "_attn_implementation_internal"):
            if hasattr(shape, key):
                delattr(shape, key)
        shape.architectures = [plain_class(model).__name__]
        if reason and isinstance(policy, PeftModel) and getattr(shape, "tie_word_embeddings", False):
            # An adapter, or a copy that is trained, on one end of tied weights parts them.
            parted = set(model.all_tied_weights_keys) & {name for name, _ in iter_weights(policy)}
            shape.tie_word_embeddings = not parted
        shape.dtype = self.dtype
        shape.save_pretrained(self.model_folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(self.model_folder)

    def arguments(self, *, shares_gpu: bool) -> dict[str, Any]:
        """Arguments of vLLM's engine; shares_gpu: the trainer has memory of the same GPUs."""
        config, on_cpu = self.config, self.device == "cpu"
        kv_cache_gib = config.vllm_kv_cache_gib or (CPU_KV_CACHE_GIB if on_cpu else 0)
        arguments: dict[str, Any] = {
            "model": str(self.model_folder),
            "load_format": "dummy",
            "dtype": str(self.dtype).removeprefix("torch."),
            "seed": 0,
            "max_model_len": config.vllm_max_model_len or -1,  # as long as the model, or the memory, allows
            "max_num_seqs": config.vllm_max_num_seqs,
            "weight_transfer_config": {"backend": BACKEND},
            # Log-probabilities of temperature 1 as computed, those of another one after it was applied: see
            # `check_vllm_sampling`.
            "logprobs_mode": "raw_logprobs" if config.temperature == 1 else "processed_logprobs",
        }
        if kv_cache_gib:
            arguments["kv_cache_memory_bytes"] = int(kv_cache_gib * GIB)
        if not on_cpu:  # vLLM wants that much to be free, whatever keys and values get
            arguments["gpu_memory_utilization"] = config.vllm_gpu_memory_utilization or (0.3 if shares_gpu else 0.9)
        if on_cpu:
            # A seeded completion whose prompt is computed in pieces fails on a CPU, whose generators cannot go back.
            arguments |= {"enforce_eager": True, "enable_chunked_prefill": False}
        if config.vllm_tensor_parallel_size > 1:
            arguments["tensor_parallel_size"] = config.vllm_tensor_parallel_size
        if self.adapter:  # two: what was sampled from the last one may still be on its way
            arguments |= {"enable_lora": True, "max_lora_rank": self.lora_rank, "max_loras": 2}
        return arguments

    def check(
        self, prompts: list[list[int]], n: int, sampling: Sampling, prompt_numbers: list[int], max_model_len: int
    ) -> None:
        """Raise ValueError for what would fail on the way, before anything is sent."""
        limit = "that vLLM can hold: shorten one of them, or raise vllm_max_model_len or vllm_kv_cache_gib"
        keywords = {"tokenizer": self.tokenizer, "vocabulary": self.vocabulary, "context": (max_model_len, limit)}
        check_call(prompts, n, sampling, prompt_numbers, **keywords)
        check_masks(sampling, self.tokenizer, device=self.device)
        if (sampling.temperature == 1) != (self.config.temperature == 1) and sampling.temperature != 0:
            raise ValueError(
                f"temperature is {sampling.temperature}, but the engine was built for {self.config.temperature}: vLLM "
                "reports log-probabilities for temperature 1 or for others, as it was started."
            )
        if sampling.masks and self.config.temperature != 1:
            raise ValueError(
                f"{sampling.masks[0]} is set, but the engine was built for temperature {self.config.temperature}: vLLM "
                "has log-probabilities over the whole vocabulary where it was started for temperature 1."
            )
        if n > self.config.vllm_max_num_seqs:
            raise ValueError(f"n is {n}: ask for at most vllm_max_num_seqs = {self.config.vllm_max_num_seqs}.")

    def sampling_parameters(self, sampling: Sampling, n: int, seed: int, number: int) -> dict[str, Any]:
        """Arguments of vLLM's SamplingParams for the completions of prompt `number`.

        vLLM draws completion i with seed + i. The seed is a hash of all numbers but i, so no two completions share one.
        """
        key = int(noise_keys(seed, torch.tensor([number]), torch.tensor([0]))[0]) % 2**62
        parameters: dict[str, Any] = {
            "n": n,
            "temperature": sampling.temperature,
            "seed": key,
            "max_tokens": sampling.max_completion_length,
            "logprobs": 0,  # of the sampled token alone
            "stop_token_ids": sorted({*self.stop_token_ids, *sampling.stop_token_ids}),
            "ignore_eos": True,  # those are all of them
            "detokenize": bool(sampling.stop),
        }
        if sampling.stop:
            parameters |= {"stop": list(sampling.stop), "include_stop_str_in_output": True}
        if sampling.bad_words:
            parameters["bad_words"] = list(sampling.bad_words)
        if structured_outputs(sampling):
            parameters["structured_outputs"] = structured_outputs(sampling)
        if sampling.temperature > 0:
            parameters |= {"top_p": sampling.top_p, "top_k": sampling.top_k, "min_p": sampling.min_p}
        return parameters

    def completions(self, rows: list[tuple[list[int], list[float], str, int]]) -> list[Completion]:
        """Completions of (token ids, log-probabilities, finish reason, weight version)."""
        if not all(math.isfinite(value) for _, logprobs, _, _ in rows for value in logprobs):
            raise RuntimeError(
                "the policy gave a log-probability that is not finite while sampling: its weights hold NaN or "
                "infinity, or its dtype overflows; lower the learning rate or use a wider torch_dtype."
            )
        texts = [""] * len(rows)
        if self.tokenizer is not None and rows:
            texts = self.tokenizer.batch_decode(
                [row[0] for row in rows], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        return [
            Completion(tokens, logprobs, "stop" if reason == "stop" else "length", text, version)
            for (tokens, logprobs, reason, version), text in zip(rows, texts, strict=True)
        ]


def _dtype(
    config: RolloutConfig, policy: torch.nn.Module, autocast: Callable[[], AbstractContextManager[Any]]
) -> torch.dtype:
    """The dtype to serve in: as asked, else the one the trainer computes in (vLLM has no float64)."""
    if config.vllm_dtype != "auto":
        return getattr(torch, config.vllm_dtype)
    device = next(policy.parameters()).device.type
    with autocast():
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
    own = getattr(getattr(policy, "config", None), "dtype", None) or next(policy.parameters()).dtype
    return torch.float32 if own == torch.float64 else own


def one_sentence(error: str) -> str | None:
    """What to change, where vLLM failed for want of memory or for a model it does not know; None elsewhere."""
    if "less than desired GPU memory utilization" in error:
        return "the GPU has less free memory than vllm_gpu_memory_utilization is of it: lower that, or free some."
    if any(words in error for words in ("KV cache", "cache blocks", "memory utilization", "out of memory")):
        return (
            "vLLM has too little memory for keys and values: raise vllm_kv_cache_gib (or vllm_gpu_memory_utilization), "
            "or lower vllm_max_model_len."
        )
    if "are not supported for now" in error or "does not support LoRA" in error:
        return "vLLM does not serve this model, or no adapter on it: set weight_sync to full or engine to transformers."
    if "head_dim" in error or "head size" in error:
        return "vLLM has no attention for this model's head_dim on a CPU: set engine to transformers."
    return None


class VllmEngine:
    """The engine `vllm`. Calls from several threads wait for each other."""

    off_policy = True

    def __init__(self, served: Served):
        """Starts vLLM; collective over all processes.

        Raises ValueError: vLLM does not fit the model, the memory or the number of processes.
        """
        self.weight_version = 0
        self._served = served
        self._lock = threading.RLock()
        self._asleep = False
        self._serves = False  # whether the last sync went through, and nothing has failed since
        self._base_sent = False
        self._lora: Any = None
        self._transport = Transport()
        self._sleeps = served.device == "cuda" and served.config.vllm_sleep
        self._group, self._rank_in_group = _tensor_parallel_group(served.config.vllm_tensor_parallel_size)
        self._made_group = not torch.distributed.is_initialized()  # vLLM makes a default group where there is none
        self._llm = self._start()
        self.max_model_len = self._llm.model_config.max_model_len
        self._transport.open(self._control, 1)
        atexit.register(self.close)
        self.rest()  # no weights yet: SFT and DPO may train long before their first evaluation

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
                    **self._served.arguments(shares_gpu=True),
                    skip_tokenizer_init=self._served.tokenizer is None,
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
        """Hands over the policy's weights, or its adapter; every process calls this.

        Raises ValueError: vLLM has no place for a tensor, or one is missing.
        """
        start = time.perf_counter()
        policy, served = unwrap(policy), self._served
        with self._lock, torch.no_grad():
            version, self._serves = self.weight_version + 1, False
            if self._asleep:
                self._llm.wake_up(tags=["weights"])
            tensors = size = 0
            if not served.adapter or not self._base_sent:
                tensors, size = self._send(policy)
                self._base_sent = True
            if served.adapter:
                count, adapter_bytes = self._send_adapter(policy, version)
                tensors, size = tensors + count, size + adapter_bytes
            if self._asleep:
                self._llm.wake_up(tags=["kv_cache"])
                self._asleep = False
            if not self._llm.reset_prefix_cache():
                raise RuntimeError("vLLM kept keys and values of the old weights (requests are running).")
            self._llm.update_weight_version(str(version))
            self.weight_version, self._serves = version, True
        return SyncReport(weight_version=version, tensors=tensors, bytes=size, seconds=time.perf_counter() - start)

    def _send(self, policy: torch.nn.Module) -> tuple[int, int]:
        """All weights; those of the base, where the adapter goes by itself."""
        tensors = size = 0
        try:
            self._llm.start_weight_update()
            for bucket in buckets(iter_weights(policy, dtype=self._served.dtype, adapter=not self._served.adapter)):
                self._transport.send(self._control, bucket)
                tensors, size = tensors + len(bucket), size + sum(tensor.nbytes for _, tensor in bucket)
            self._llm.finish_weight_update()
        except Exception as error:
            give_up(self._control)
            if isinstance(error, ValueError | KeyError):
                raise ValueError(f"vLLM refused the policy's weights: {error}") from error
            raise
        return tensors, size

    def _send_adapter(self, policy: torch.nn.Module, version: int) -> tuple[int, int]:
        from vllm.lora.request import LoRARequest

        folder = self._served.folder / f"adapter-{version}"
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
        if not self._serves:
            raise RuntimeError("vLLM has no weights, or not all of them: call sync before sample.")
        self._served.check(prompts, n, sampling, prompt_numbers, self.max_model_len)
        asked = [(prompt, number) for prompt, number in zip(prompts, prompt_numbers, strict=True)]
        shares = [asked]
        if self._group is not None:  # its processes sample everybody's prompts together
            shares = [[] for _ in range(self._served.config.vllm_tensor_parallel_size)]
            torch.distributed.all_gather_object(shares, asked, group=self._group)
        everything = [pair for share in shares for pair in share]
        start = sum(len(share) for share in shares[: self._rank_in_group])
        if not everything:
            return []
        drawn = 1 if sampling.temperature == 0 else n
        with self._lock:
            outputs = self._generate(everything, drawn, sampling, seed)[start : start + len(asked)]
        rows = [self._row(output) for group in outputs for output in group]
        completions = iter(self._served.completions(rows))
        groups = [[next(completions) for _ in range(drawn)] for _ in asked]
        return [group * n if drawn < n else group for group in groups]

    def _generate(self, asked: list[tuple[list[int], int]], n: int, sampling: Sampling, seed: int) -> list[list[Any]]:
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        parameters = []
        for _, number in asked:
            fields = self._served.sampling_parameters(sampling, n, seed, number)
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
            self._serves = False
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

    def rest(self) -> None:
        """Frees the GPU memory until the next sync: weights are dropped (with an adapter, moved to the host)."""
        if self._sleeps and not self._asleep:
            with self._lock:
                self._llm.sleep(level=1 if self._served.adapter else 2)
                self._asleep, self._serves = True, False

    def close(self) -> None:
        """Ends vLLM, if that does not take the trainer's process group along: then it ends with the process."""
        if self._llm is not None and self._made_group:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None
        shutil.rmtree(self._served.folder, ignore_errors=True)


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
