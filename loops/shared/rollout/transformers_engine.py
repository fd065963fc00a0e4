"""The embedded engine: completions from the policy's own module, by ordinary Hugging Face forwards.

Each distinct prompt is computed once for all its completions; all completions are decoded together, one forward per
token; finished ones leave the batch.

Shapes: P prompts, U distinct prompts, R sequences, T completion tokens, L prompt tokens (left-padded), V vocabulary.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from transformers import Cache

from loops.shared.layers import base_model
from loops.shared.models import stop_token_ids
from loops.shared.policy import learned_positions
from loops.shared.rollout.cache import PromptCache
from loops.shared.rollout.config import Sampling, check_transformers_sampling
from loops.shared.rollout.engine import Completion, SyncReport, build_completions, check_call, decode
from loops.shared.rollout.sampling import (
    bad_word_table,
    bad_word_tokens,
    banned_tokens,
    choose_tokens,
    noise_keys,
    uniform_noise,
)
from loops.shared.sharding import unsharded

# Columns of keys and values, and of noise, made ahead of need.
_ROOM = 128
# Finished sequences leave once no more than this share of the batch is still running.
_KEEP = 0.875


class TransformersEngine:
    """Samples in process from the policy itself, so its weights are never stale and a sync moves nothing."""

    is_off_policy = False

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Any,
        *,
        max_decode_batch: int = 0,
        prefill_token_budget: int = 16384,
        check_every: int = 0,
        autocast: Callable[[], AbstractContextManager[Any]] | None = None,
    ):
        """Takes the policy, unwrapped.

        Args:
            model: a Hugging Face causal language model, or a PEFT model around one.
            tokenizer: decodes completions and knows the stop token; None leaves completions without text.
            max_decode_batch: sequences decoded together; 0 is all of a call.
            prefill_token_budget: prompt tokens, padding included, in one forward (a longer prompt goes alone).
            check_every: tokens between two checks for finished sequences (each check waits for the device; until then
                finished ones are decoded further); 0 is 1 on a CPU and 8 elsewhere.
            autocast: makes the context of the trainer's forwards (mixed precision); None is none.
        """
        self.weight_version = 0
        self._model: Any = model
        self._tokenizer = tokenizer
        self._max_decode_batch = max_decode_batch
        self._prefill_token_budget = prefill_token_budget
        self._check_every = check_every
        self._autocast = autocast or nullcontext
        causal_model = base_model(model)
        # Of the class: accelerate may have put a wrapper without names in front of the instance's.
        self._arguments = set(inspect.signature(type(causal_model).forward).parameters)
        if "past_key_values" not in self._arguments:  # it would be swallowed, and each token drawn from the last alone
            raise ValueError(
                f"the transformers engine cannot sample from {type(causal_model).__name__}, which keeps its state "
                "elsewhere than in past_key_values; choose another model_id, or set eval_reward: null in SFT and DPO."
            )
        self._own_stop_token_ids = stop_token_ids(causal_model, tokenizer)
        self._vocabulary = causal_model.config.get_text_config().vocab_size
        self._positions = learned_positions(model)

    def sync(self, policy: torch.nn.Module) -> SyncReport:
        """Counts a new version: the policy that trains is the one that samples.

        Raises ValueError: `policy` holds other parameters than the engine's model.
        """
        start = time.perf_counter()
        if next(policy.parameters()) is not next(self._model.parameters()):
            raise ValueError(
                "the transformers engine samples from the module it was built with, and sync was given another one: "
                "build the engine with the policy that trains."
            )
        self.weight_version += 1
        return SyncReport(weight_version=self.weight_version, tensors=0, bytes=0, seconds=time.perf_counter() - start)

    def sleep(self) -> None:
        """Nothing to free: the weights are the policy's."""

    def close(self) -> None:
        """Nothing to end."""

    def sample(
        self,
        prompts: list[list[int]],
        *,
        n: int,
        sampling: Sampling,
        seed: int,
        prompt_numbers: list[int],
        arrived: Callable[[int, list[Completion]], None] | None = None,
    ) -> list[list[Completion]]:
        """Samples n completions of each prompt; see `engine.Engine.sample`. All end at once: `arrived` is unused.

        Raises ValueError: no prompt numbers for some prompts, an empty prompt, n below 1, a stop token that the model
        does not have, stop strings or bad words without a tokenizer, or structured outputs, which only vLLM has;
        RuntimeError: the policy gives a log-probability that is NaN or inf.
        """
        check_transformers_sampling(sampling)
        limit = "positions that the model has learned: lower max_completion_length or max_seq_length"
        keywords = {"tokenizer": self._tokenizer, "vocabulary": self._vocabulary, "context": (self._positions, limit)}
        check_call(prompts, n, sampling, prompt_numbers, **keywords)
        with unsharded(self._model):  # all processes, those without prompts too
            return self._sample(prompts, n, sampling, seed, prompt_numbers) if prompts else []

    def _sample(
        self, prompts: list[list[int]], n: int, sampling: Sampling, seed: int, prompt_numbers: list[int]
    ) -> list[list[Completion]]:
        # Shortest first: prompts of one micro-batch, and of one generation batch, need little padding.
        order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
        distinct = {tuple(prompts[place]): None for place in order}
        owner_of = {prompt: owner for owner, prompt in enumerate(distinct)}
        device = next(self._model.parameters()).device
        places = [(place, number) for place in order for number in range(n)]
        owners = torch.tensor([owner_of[tuple(prompts[place])] for place, _ in places], device=device)  # [R]
        keys = noise_keys(
            seed,
            torch.tensor([prompt_numbers[place] for place, _ in places], device=device),
            torch.tensor([number for _, number in places], device=device),
        )
        completions: dict[tuple[int, int], Completion] = {}
        rows = self._max_decode_batch or len(places)
        with _evaluating(self._model), torch.no_grad(), self._autocast():
            prefilled = self._prefill([list(prompt) for prompt in distinct], device)
            for start in range(0, len(places), rows):
                part = slice(start, start + rows)
                decoded = self._decode(*prefilled, owners[part], keys[part], sampling)
                completions.update(zip(places[part], decoded, strict=True))
        return [[completions[place, number] for number in range(n)] for place in range(len(prompts))]

    def _prefill(
        self, prompts: list[list[int]], device: torch.device
    ) -> tuple[PromptCache, torch.Tensor, torch.Tensor]:
        """Keys and values, lengths [U] and next-token logits [U, V] of the distinct prompts, shortest first."""
        cache = PromptCache(self._model.config)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        logits = []
        start = 0
        while start < len(prompts):
            stop = start + 1
            while stop < len(prompts) and (
                not cache.plain or (stop + 1 - start) * len(prompts[stop]) <= self._prefill_token_budget
            ):
                stop += 1
            width = len(prompts[stop - 1])
            padded = [[0] * (width - len(prompt)) + prompt for prompt in prompts[start:stop]]
            mask = torch.arange(width, device=device) >= width - lengths[start:stop, None]  # [u, L]
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            tokens = torch.tensor(padded, device=device)
            logits.append(self._forward(tokens, mask.long(), positions, cache.microbatch(start, stop)))
            start = stop
        return cache, lengths, torch.cat(logits)

    def _forward(self, tokens: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Logits [rows, V] after the last of tokens [rows, columns]; fills the cache."""
        arguments = {"position_ids": positions, "logits_to_keep": 1}
        return self._model(
            input_ids=tokens,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            **{name: value for name, value in arguments.items() if name in self._arguments},
        ).logits[:, -1]

    def _decode(
        self,
        prompt_cache: PromptCache,
        prompt_lengths: torch.Tensor,
        prompt_logits: torch.Tensor,
        owners: torch.Tensor,
        keys: torch.Tensor,
        sampling: Sampling,
    ) -> list[Completion]:
        """Decodes one generation batch.

        Args:
            prompt_cache: from `_prefill`, as are `prompt_lengths` [U] and `prompt_logits` [U, V].
            owners: [R] int64, the prompt of each sequence.
            keys: [R] int64, the noise key of each sequence.
            sampling: how tokens are drawn and when a completion ends.
        """
        device, rows, limit = owners.device, len(owners), sampling.max_completion_length
        stops = torch.tensor(
            sorted({*self._own_stop_token_ids, *sampling.stop_token_ids}), dtype=torch.long, device=device
        )
        words = bad_word_table(bad_word_tokens(sampling.bad_words, self._tokenizer), device)
        lengths = prompt_lengths[owners]  # [R]
        width = int((lengths if prompt_cache.plain else prompt_lengths).max())
        cache = prompt_cache.expanded(owners, width, min(limit, _ROOM))
        mask = (torch.arange(width + limit, device=device) >= width - lengths[:, None]).long()  # [R, L + T]
        positions = lengths[:, None]
        tokens = torch.full((rows, limit), -1, device=device)
        logprobs = torch.zeros((rows, limit), dtype=torch.float64, device=device)
        ends = torch.zeros(rows, dtype=torch.long, device=device)  # tokens up to the stop, 0 where none came
        live = torch.arange(rows, device=device)  # the sequence in each row of the batch
        check_every = self._check_every or (1 if device.type == "cpu" else 8)
        checked = 0
        logits = prompt_logits[owners]
        for step in range(limit):
            if step % _ROOM == 0:
                noise = uniform_noise(keys[live], step, _ROOM)  # [live, _ROOM]
            banned = None if words is None else banned_tokens(words, tokens[live, :step], logits.shape[-1])
            chosen, chosen_logprobs = choose_tokens(logits, noise[:, step % _ROOM], sampling, banned)  # [live]
            tokens[live, step] = chosen
            logprobs[live, step] = chosen_logprobs.double()
            length = step + 1
            if length % check_every == 0 or length == limit:
                self._mark_ends(tokens, ends, live, slice(checked, length), stops, sampling.stop)
                checked = length
                running = ends[live] == 0
                num_running = int(running.sum())
                if num_running == 0 or length == limit:
                    break
                if num_running <= _KEEP * len(live):
                    kept = running.nonzero()[:, 0]
                    live, chosen, noise = live[kept], chosen[kept], noise[kept]
                    positions, mask = positions[kept], mask[kept]
                    cache.reorder_cache(cast(torch.LongTensor, kept))
            logits = self._forward(chosen[:, None], mask[:, : width + length], positions + step, cache)
        return self._completions(tokens, logprobs, ends, limit)

    def _mark_ends(
        self,
        tokens: torch.Tensor,
        ends: torch.Tensor,
        live: torch.Tensor,
        new: slice,
        stops: torch.Tensor,
        strings: list[str],
    ) -> None:
        """Writes into ends [R] where the sequences `live` stopped, if with one of the tokens `new`."""
        is_stop = torch.isin(tokens[live, new], stops)  # [live, new tokens]
        found = torch.where(is_stop.any(-1), new.start + 1 + is_stop.int().argmax(-1), 0)
        if strings:
            string_ends = self._string_ends(tokens[live, : new.stop], new.start, strings)
            found = torch.where((string_ends > 0) & ((found == 0) | (string_ends < found)), string_ends, found)
        ends[live] = torch.where(ends[live] == 0, found, ends[live])

    def _string_ends(self, tokens: torch.Tensor, start: int, strings: list[str]) -> torch.Tensor:
        """Tokens [live] up to the one of tokens [live, start:] that completes a stop string, 0 where none does."""
        # A token that shows adds at least a byte; 4 more so that the tail's first characters decode as in the text.
        first = max(0, start - max(len(string.encode()) for string in strings) - 4)
        tails = tokens[:, first:].tolist()
        found = [0] * len(tails)
        for row, text in enumerate(decode(self._tokenizer, tails)):
            if any(string in text for string in strings):
                prefixes = decode(
                    self._tokenizer, [tails[row][: end - first] for end in range(start + 1, tokens.shape[1] + 1)]
                )
                hits = [any(string in prefix for string in strings) for prefix in prefixes]
                found[row] = start + 1 + hits.index(True)
        return torch.tensor(found, device=tokens.device)

    def _completions(
        self, tokens: torch.Tensor, logprobs: torch.Tensor, ends: torch.Tensor, limit: int
    ) -> list[Completion]:
        """Cuts tokens [R, T] and logprobs [R, T] at ends [R]."""
        stopped = ends > 0
        lengths = torch.where(stopped, ends, limit)
        rows = [
            (ids[:cut], values[:cut], "stop" if has_stopped else "length", self.weight_version)
            for ids, values, cut, has_stopped in zip(
                tokens.tolist(), logprobs.tolist(), lengths.tolist(), stopped.tolist(), strict=True
            )
        ]
        return build_completions(self._tokenizer, rows)


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside (no dropout, and no gradient checkpointing, which drops the cache), and no compiled layers
    (a growing cache would compile them again and again); afterwards each module's own mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module in training:
            module.training = True
