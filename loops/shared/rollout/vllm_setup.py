"""What both vLLM engines need: the folder that vLLM starts from, its arguments, sampling parameters, completions."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from loops.shared.adapters import ADAPTER, served_rank
from loops.shared.layers import base_model
from loops.shared.models import stop_token_ids
from loops.shared.rollout.config import RolloutConfig, Sampling
from loops.shared.rollout.engine import check_call
from loops.shared.rollout.masks import check_masks, structured_outputs
from loops.shared.rollout.sampling import noise_keys
from loops.shared.rollout.weight_transfer import BACKEND, is_plain_lora
from loops.shared.weights import iter_weights, plain_class

GIB = 2**30
CPU_KV_CACHE_GIB = 0.25


class VllmSetup:
    """What vLLM serves, decided from the policy and the config: model folder, dtype, adapter, stop tokens."""

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
        plain = is_plain_lora(policy)
        if config.weight_sync == "adapter" and not plain:
            raise ValueError(
                "weight_sync is adapter, and vLLM cannot serve this policy's alone: set weight_sync to full."
            )
        chosen = config.weight_sync == "adapter" or (config.weight_sync == "auto" and self.device != "cpu")
        self.sends_adapter = chosen and plain
        self.lora_rank = 0
        if self.sends_adapter:
            self.lora_rank = served_rank(policy.peft_config[ADAPTER].r)  # type: ignore[operator,union-attr]
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
        if not plain and isinstance(policy, PeftModel) and getattr(shape, "tie_word_embeddings", False):
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
        if self.sends_adapter:  # two: what was sampled from the last one may still be on its way
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
