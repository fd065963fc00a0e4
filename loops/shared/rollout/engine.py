"""What every rollout engine does and returns: the protocol `Engine`.

An engine turns prompts (token ids) into completions (token ids and their log-probabilities) under the policy's current
weights. The loops know no engine by its name: whether the tokens come from the policy's own module, from vLLM in the
same process or from a server is the engine's business, and what follows from it is an attribute of the engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from loops.shared.rollout.config import Sampling


@dataclass(frozen=True)
class Completion:
    """One sampled continuation of a prompt."""

    token_ids: list[int]
    """Sampled tokens; the stop token is the last one when the model stopped by itself, a truncated one has none."""
    logprobs: list[float]
    """log softmax(logits / temperature) of each sampled token in at least fp32, over the whole vocabulary: without
    top-p, top-k, min-p, bad words and structured outputs, so that it is what the trainer scores. Greedy sampling
    reports temperature 1."""
    finish_reason: Literal["stop", "length"]
    """`stop`: a stop token or stop string came; `length`: cut at `max_completion_length`."""
    text: str
    """The decoded tokens, special tokens left out (no tokenizer: empty)."""
    weight_version: int
    """The engine's weight version that sampled it: the oldest one, where weights changed on the way."""


@dataclass(frozen=True, kw_only=True)
class SyncReport:
    """What one weight update moved."""

    weight_version: int  # version of the weights that serve from now on; it grows by one with each sync
    tensors: int  # named tensors sent; 0 where the engine samples from the policy itself
    bytes: int  # bytes sent
    seconds: float  # wall time from the call until the new weights serve


Arrived = Callable[[int, list[Completion]], None]  # takes the place of a prompt and its n completions


class Engine(Protocol):
    """A sampler of completions that follows the policy's weights."""

    weight_version: int  # version of the weights that serve; 0 before the first sync
    is_off_policy: bool  # whether tokens come from other kernels, or older weights, than those that train on them

    def sync(self, policy: torch.nn.Module) -> SyncReport:
        """Makes the engine serve the policy's present weights, and nothing older.

        Raises ValueError: the policy does not fit the engine's model.
        """
        ...

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
        """Samples n completions of each prompt.

        Args:
            prompts: P prompts as token ids, at least one token each.
            n: completions per prompt.
            sampling: how tokens are drawn and when a completion ends.
            seed: with `prompt_numbers`, the only source of chance: the noise of a token depends on (seed, prompt
                number, completion 0..n-1, position in the completion), never on the batch or the rank.
            prompt_numbers: P integers that name the prompts, the same on every rank that could draw them.
            arrived: called once for each prompt, in the caller's thread while others are sampled, by engines that
                finish prompts one by one; others, which have all of them at once, do not call it.

        Returns:
            P lists of n completions, in the order of `prompts`.

        Raises ValueError: no prompt numbers for some prompts, or an empty prompt.
        """
        ...

    def sleep(self) -> None:
        """Frees the engine's GPU memory until the next `sync`; nothing can be sampled until then."""
        ...

    def close(self) -> None:
        """Ends what the engine started: servers, processes, temporary files."""
        ...


def decode(tokenizer: Any, token_ids: Sequence[list[int]]) -> list[str]:
    """Texts without special tokens; empty ones without a tokenizer."""
    if tokenizer is None or not token_ids:
        return [""] * len(token_ids)
    return tokenizer.batch_decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def build_completions(tokenizer: Any, rows: Sequence[tuple[list[int], list[float], str, int]]) -> list[Completion]:
    """Completions of (token ids, log-probabilities, finish reason, weight version).

    Raises RuntimeError: a log-probability is NaN or inf.
    """
    if not all(math.isfinite(value) for _, logprobs, _, _ in rows for value in logprobs):
        raise RuntimeError(
            "the policy gave a log-probability that is NaN or inf while sampling: its weights hold NaN or inf, or its "
            "dtype overflows; lower the learning rate or use a wider torch_dtype."
        )
    texts = decode(tokenizer, [row[0] for row in rows])
    return [
        Completion(tokens, logprobs, "stop" if reason == "stop" else "length", text, version)
        for (tokens, logprobs, reason, version), text in zip(rows, texts, strict=True)
    ]


def check_call(
    prompts: list[list[int]],
    n: int,
    sampling: Sampling,
    prompt_numbers: list[int],
    *,
    tokenizer: Any,
    vocabulary: int,
    context: tuple[int | None, str],
) -> None:
    """Raise ValueError for arguments of `Engine.sample` that no engine can do; the model has `vocabulary` tokens.

    context: how many tokens a prompt and its completion may have together (None: any number), and what limits them.
    """
    if len(prompts) != len(prompt_numbers):
        raise ValueError(f"there are {len(prompts)} prompts and {len(prompt_numbers)} prompt_numbers: give one each.")
    if n < 1:
        raise ValueError(f"n is {n}: ask for 1 or more completions per prompt.")
    for place, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {place} (number {prompt_numbers[place]}) has no tokens: leave it out.")
        length, limit = sampling.max_completion_length, context[0]
        if limit is not None and len(prompt) + length > limit:
            raise ValueError(
                f"prompt {place} (number {prompt_numbers[place]}) has {len(prompt)} tokens, and with "
                f"max_completion_length {length} that is more than the {limit} {context[1]}."
            )
    for token in sampling.stop_token_ids:
        if token >= vocabulary:
            raise ValueError(f"stop_token_ids holds {token}, and the model has {vocabulary} tokens: correct it.")
    if sampling.stop and tokenizer is None:
        raise ValueError("stop strings need a tokenizer: give the engine one, or use stop_token_ids.")
    if sampling.masks and tokenizer is None:
        raise ValueError(f"{sampling.masks[0]} needs a tokenizer: give the engine one, or leave it out.")
