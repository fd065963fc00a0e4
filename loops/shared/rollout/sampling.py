"""Drawing tokens: noise that belongs to a place in a completion, inverse-CDF sampling, and bad words.

Shapes: R sequences, V vocabulary, K tokens kept by a truncation, T tokens sampled so far, W bad words of S tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from loops.shared.rollout.config import Sampling

# splitmix64 (Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", 2014): a counter that moves by the
# golden ratio, and a bijective mixer. As signed 64-bit numbers, since torch has no unsigned arithmetic.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - 2**64
_MULTIPLIER_2 = 0x94D049BB133111EB - 2**64

_NOISE_BITS = 48

_BLOCK = 256


def noise_keys(seed: int, prompt_numbers: torch.Tensor, completion_numbers: torch.Tensor) -> torch.Tensor:
    """One key per sequence, from which all its noise follows.

    Args:
        seed: any integer (its lowest 64 bits count).
        prompt_numbers: [R] int64.
        completion_numbers: [R] int64, the place of each completion among those of its prompt.

    Returns:
        [R] int64. Each number is absorbed by the mixer, which is a bijection: different prompts of one seed, and
        different completions of one prompt, never share a key.
    """
    low = seed % 2**64
    key = torch.full_like(prompt_numbers, low - 2**64 if low >= 2**63 else low)
    for number in (prompt_numbers, completion_numbers):
        key = _mix(_mix(key + _GOLDEN) ^ number)
    return key


def uniform_noise(keys: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """Uniform numbers of token positions `start .. start + count - 1`.

    Args:
        keys: [R] int64, from `noise_keys`.
        start: first token position.
        count: number of positions.

    Returns:
        [R, count] float64, strictly between 0 and 1: 48 random bits and a half, so that neither end is ever reached,
        not even after a product with a rounded total.
    """
    counters = torch.arange(start + 1, start + count + 1, device=keys.device)
    bits = _mix(keys[:, None] + counters * _GOLDEN)
    return (_shift_right(bits, 64 - _NOISE_BITS).double() + 0.5) * 2.0**-_NOISE_BITS


def _mix(state: torch.Tensor) -> torch.Tensor:
    """splitmix64's finaliser. Products wrap modulo 2^64, in two's complement the same bits signed or unsigned."""
    state = (state ^ _shift_right(state, 30)) * _MULTIPLIER_1
    state = (state ^ _shift_right(state, 27)) * _MULTIPLIER_2
    return state ^ _shift_right(state, 31)


def _shift_right(state: torch.Tensor, places: int) -> torch.Tensor:
    """Logical shift: `>>` on int64 copies the sign bit in, so those places are cleared."""
    return (state >> places) & ((1 << (64 - places)) - 1)


def bad_word_tokens(words: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """The token ids that must not come one after the other, by vLLM's rule (`SamplingParams.update_from_tokenizer`):
    those of each word, and those of the word after a space, if their first is another one and they are as many.

    Raises ValueError: a word has no tokens.
    """
    sequences = []
    for word in words:
        texts = word.lstrip(), " " + word.lstrip()
        alone, after_space = (tokenizer.encode(text, add_special_tokens=False) for text in texts)
        if not alone:
            raise ValueError(f"bad_words holds {word!r}, which has no tokens: remove it.")
        sequences.append(alone)
        if len(after_space) == len(alone) and after_space[0] != alone[0]:
            sequences.append(after_space)
    return sequences


def bad_word_table(sequences: list[list[int]], device: torch.device) -> torch.Tensor | None:
    """[W, S] int64 of `bad_word_tokens`, shorter ones filled with -1 in front; None of none."""
    longest = max(map(len, sequences), default=0)
    rows = [[-1] * (longest - len(sequence)) + sequence for sequence in sequences]
    return torch.tensor(rows, device=device) if rows else None


def banned_tokens(words: torch.Tensor, completions: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Which tokens would complete a bad word.

    Args:
        words: [W, S] int64, from `bad_word_table`.
        completions: [R, T] int64, the tokens sampled so far; a bad word does not begin in the prompt.
        vocabulary: V.

    Returns:
        [R, V] bool.
    """
    before, last = words[:, :-1], words[:, -1]
    recent = torch.nn.functional.pad(completions, (before.shape[1], 0), value=-1)  # no token before the first
    recent = recent[:, recent.shape[1] - before.shape[1] :]
    completes = ((recent[:, None] == before) | (before == -1)).all(-1) & (last < vocabulary)  # [R, W]
    banned = torch.zeros(len(completions), vocabulary, dtype=torch.int, device=words.device)
    return banned.scatter_add_(-1, last.clamp(max=vocabulary - 1).expand_as(completes), completes.int()) > 0


def choose_tokens(
    logits: torch.Tensor, noise: torch.Tensor, sampling: Sampling, banned: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws one token per sequence.

    Args:
        logits: [R, V].
        noise: [R] float64 in (0, 1); not read when greedy.
        sampling: temperature and truncations.
        banned: [R, V] bool, tokens that cannot be drawn; truncations go by what is left.

    Returns:
        tokens [R] int64, and their log-probabilities [R] under the unrestricted softmax(logits / temperature)
        (temperature 1 when greedy), in fp32 (fp64 for fp64 logits).
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if sampling.temperature not in (0, 1):
        logits = logits / sampling.temperature
    left = logits if banned is None else logits.masked_fill(banned, -torch.inf)
    probabilities = torch.softmax(left, -1)
    if sampling.temperature == 0:
        tokens = left.argmax(-1, keepdim=True)
    elif sampling.top_k or sampling.top_p < 1:
        weights, candidates = _most_likely(probabilities, sampling.top_k, sampling.top_p)  # [R, K] each
        weights = weights * (weights >= sampling.min_p * weights[:, :1])
        tokens = candidates.gather(-1, _inverse_cdf(weights, noise))
    elif sampling.min_p:
        allowed = probabilities >= sampling.min_p * probabilities.amax(-1, keepdim=True)
        tokens = _inverse_cdf(probabilities * allowed, noise)
    else:
        tokens = _inverse_cdf(probabilities, noise)
    if banned is not None:  # what is drawn may have had next to no probability
        return tokens[:, 0], logits.log_softmax(-1).gather(-1, tokens)[:, 0]
    # The log of a probability is as exact as log-softmax where the probability is one that gets drawn, and one pass
    # over the vocabulary does for both.
    return tokens[:, 0], probabilities.gather(-1, tokens).log()[:, 0]


def _most_likely(probabilities: torch.Tensor, top_k: int, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [R, K], most likely first and 0 out of the nucleus, and the tokens [R, K] they belong to."""
    vocabulary = probabilities.shape[-1]
    keep = min(top_k or 1024, vocabulary)
    while True:
        weights, candidates = probabilities.topk(keep, -1)
        mass = weights.double().cumsum(-1)
        # The nucleus is a share of what top-k leaves, or of everything: then as many are sorted as hold it.
        if top_k or keep == vocabulary or bool((mass[:, -1] >= top_p).all()):
            break
        keep = min(8 * keep, vocabulary)
    whole = mass[:, -1:] if top_k else 1.0
    # A token stays while the mass before it is short of the nucleus, so the most likely one always does.
    return weights * (mass - weights < top_p * whole), candidates


def _inverse_cdf(weights: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Indices [R, 1] drawn in proportion to weights [R, K], one uniform number each.

    The sums are taken over blocks, in fp64 over them, and then in fp64 inside the chosen block: an order of magnitude
    faster on a large vocabulary than one running sum. Both times the place taken is the first whose sum exceeds the
    target, so its own weight is above 0: a token of probability 0 is never drawn.
    """
    size = weights.shape[-1]
    num_whole = size // _BLOCK
    block_sums = weights[:, : num_whole * _BLOCK].unflatten(-1, (num_whole, _BLOCK)).sum(-1)
    rest = weights[:, num_whole * _BLOCK :].sum(-1, keepdim=True)
    blocks = torch.cat([block_sums, rest], -1).cumsum(-1, dtype=torch.float64)  # [R, blocks]
    target = noise[:, None] * blocks[:, -1:]
    # NaN (a policy that diverged) can point past the end: stay inside, the engine reports it.
    block = torch.searchsorted(blocks, target, right=True).clamp_(max=num_whole)
    before = torch.where(block > 0, blocks.gather(-1, (block - 1).clamp_(min=0)), 0.0)
    places = block * _BLOCK + torch.arange(_BLOCK, device=weights.device)  # [R, _BLOCK]
    inside = weights.gather(-1, places.clamp(max=size - 1)) * (places < size)
    inside = inside.cumsum(-1, dtype=torch.float64)
    # The two sums over a block differ by rounding: the target must not reach the block's own end.
    target = torch.minimum(target - before, torch.nextafter(inside[:, -1:], torch.zeros_like(before)))
    return (block * _BLOCK + torch.searchsorted(inside, target, right=True)).clamp_(max=size - 1)
