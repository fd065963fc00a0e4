"""What every rollout engine takes and returns.

An engine turns prompts (token ids) into completions (token ids and their log-probabilities) under the policy's current
weights. The loops know only this file; whether the tokens come from the policy's own module, from vLLM in the same
process or from a server is the engine's business.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch

ENGINES = ("auto", "transformers", "vllm", "vllm-server")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How one token is drawn and when a completion ends.

    Truncation follows transformers' order: the k most likely tokens, of those the smallest set that holds `top_p` of
    their mass (the most likely token always stays), of those the ones at least `min_p` times as likely as the best.
    """

    temperature: float = 1.0
    """Logits are divided by it; 0 takes the most likely token (greedy) and ignores the truncations."""
    top_p: float = 1.0
    """Nucleus mass in (0, 1]; 1 is off."""
    top_k: int = 0
    """Most likely tokens kept; 0 is off."""
    min_p: float = 0.0
    """Smallest probability kept, as a share of the best one, in [0, 1); 0 is off."""
    max_completion_length: int = 256
    """Tokens a completion may have, its stop token included."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion with the token that completes them; they stay in it."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end a completion, besides the model's and the tokenizer's own."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}: set it to 0 (greedy) or above.")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p}: set it above 0 and at most 1 (1 is off).")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}: set it to 0 (off) or to the number of tokens to keep.")
        if not 0.0 <= self.min_p < 1.0:
            raise ValueError(f"min_p is {self.min_p}: set it to at least 0 (off) and below 1.")
        if self.max_completion_length < 1:
            raise ValueError(f"max_completion_length is {self.max_completion_length}: set it to 1 or more tokens.")
        if "" in self.stop:
            raise ValueError("stop holds an empty string, which every completion contains: remove it.")
        if any(token < 0 for token in self.stop_token_ids):
            raise ValueError(f"stop_token_ids is {list(self.stop_token_ids)}: token ids are 0 or above.")


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How completions are sampled."""

    engine: str = "auto"
    """`transformers` (in process, the policy's own weights), or auto."""
    num_generations: int = 8
    """Completions per prompt: the group of GRPO."""
    max_completion_length: int = 256
    """Tokens a completion may have, its stop token included."""
    temperature: float = 1.0
    """Sampling temperature; the same temperature scores the tokens."""
    top_p: float = 1.0
    """Nucleus sampling mass; 1 is off."""
    top_k: int = 0
    """Sample from the k most likely tokens; 0 is off."""
    min_p: float = 0.0
    """Drop tokens less likely than min_p times the most likely one; 0 is off."""
    stop: list[str] = field(default_factory=list)
    """Strings that end a completion (they stay in it)."""
    stop_token_ids: list[int] = field(default_factory=list)
    """Token ids that end a completion, besides the model's own stop tokens."""
    max_decode_batch: int = 0
    """Completions decoded together by the transformers engine, to bound the memory of keys and values; 0 is all."""
    prefill_token_budget: int = 16384
    """Prompt tokens (padding included) in one forward of the transformers engine."""

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ValueError(f"engine is {self.engine!r}: set it to one of {', '.join(ENGINES)}.")
        if self.num_generations < 1:
            raise ValueError(f"num_generations is {self.num_generations}: set it to 1 or more completions per prompt.")
        if self.temperature == 0:
            raise ValueError(
                f"temperature is 0, which makes all num_generations = {self.num_generations} completions of a prompt "
                "the same: set temperature above 0 (evaluation is greedy by itself)."
            )
        if self.max_decode_batch < 0:
            raise ValueError(f"max_decode_batch is {self.max_decode_batch}: set it to 0 (all) or above.")
        if self.prefill_token_budget < 1:
            raise ValueError(f"prefill_token_budget is {self.prefill_token_budget}: set it to 1 or more tokens.")
        self.sampling()

    def sampling(self) -> Sampling:
        """The sampling of training rollouts; `dataclasses.replace(..., temperature=0)` makes it greedy.

        Raises:
            ValueError: a value is out of its range.
        """
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            max_completion_length=self.max_completion_length,
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
        )


@dataclass(frozen=True)
class Completion:
    """One sampled continuation of a prompt."""

    token_ids: list[int]
    """Sampled tokens; the stop token is the last one when the model stopped by itself, a truncated one has none."""
    logprobs: list[float]
    """log softmax(logits / temperature) of each sampled token in at least fp32, over the whole vocabulary: without
    top-p, top-k, min-p, so that it is what the trainer scores. Greedy sampling reports temperature 1."""
    finish_reason: Literal["stop", "length"]
    """`stop`: a stop token or stop string came; `length`: cut at `max_completion_length`."""
    text: str
    """The decoded tokens, special tokens left out (no tokenizer: empty)."""
    weight_version: int
    """The engine's weight version that sampled it."""


@dataclass(frozen=True, kw_only=True)
class SyncReport:
    """What one weight update moved."""

    weight_version: int
    """Version of the weights that serve from now on; it grows by one with each sync."""
    tensors: int
    """Named tensors sent; 0 where the engine samples from the policy itself."""
    bytes: int
    """Bytes sent."""
    seconds: float
    """Wall time from the call until the new weights serve."""


class Engine(Protocol):
    """A sampler of completions that follows the policy's weights."""

    weight_version: int
    """Version of the weights that serve; 0 before the first sync."""

    def sync(self, policy: torch.nn.Module) -> SyncReport:
        """Makes the engine serve the policy's present weights, and nothing older.

        Raises:
            ValueError: the policy does not fit the engine's model.
        """
        ...

    def sample(
        self, prompts: list[list[int]], *, n: int, sampling: Sampling, seed: int, prompt_numbers: list[int]
    ) -> list[list[Completion]]:
        """Samples n completions of each prompt.

        Args:
            prompts: P prompts as token ids, at least one token each.
            n: completions per prompt.
            sampling: how tokens are drawn and when a completion ends.
            seed: with `prompt_numbers`, the only source of chance: the noise of a token depends on (seed, prompt
                number, completion 0..n-1, position in the completion), never on the batch or the rank.
            prompt_numbers: P integers that name the prompts, the same on every rank that could draw them.

        Returns:
            P lists of n completions, in the order of `prompts`.

        Raises:
            ValueError: no prompt numbers for some prompts, or an empty prompt.
        """
        ...
