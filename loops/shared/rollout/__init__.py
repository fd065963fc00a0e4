"""Rollouts: one contract (`contract.py`), engines behind it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from loops.shared.rollout.contract import Completion, Engine, RolloutConfig, Sampling, SyncReport

if TYPE_CHECKING:
    import torch

__all__ = ["Completion", "Engine", "RolloutConfig", "Sampling", "SyncReport", "build_engine"]


def build_engine(
    config: RolloutConfig,
    model: torch.nn.Module,
    tokenizer: Any,
    *,
    autocast: Callable[[], AbstractContextManager[Any]] | None = None,
) -> Engine:
    """The engine that `config.engine` names.

    Args:
        config: the rollout section.
        model: the policy, a Hugging Face causal language model or a PEFT model around one, unwrapped.
        tokenizer: decodes completions and knows the stop token.
        autocast: makes the context of the trainer's forwards (mixed precision); None is none.

    Raises:
        ValueError: the engine is not there yet.
    """
    if config.engine in ("vllm", "vllm-server"):
        raise ValueError(
            f"engine is {config.engine!r}, which is not built yet: set engine to transformers (or auto) for now."
        )
    # Here, so that configs can be read without loading transformers.
    from loops.shared.rollout.transformers_engine import TransformersEngine

    return TransformersEngine(
        model,
        tokenizer,
        max_decode_batch=config.max_decode_batch,
        prefill_token_budget=config.prefill_token_budget,
        autocast=autocast,
    )
