"""Keys and values of a generation batch: prompts computed once, completions written in place.

Shapes: U distinct prompts, R sequences, A key-value heads, L tokens (left-padded), D head dimension.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


class GrowingLayer(DynamicLayer):
    """One layer's keys and values in buffers with room to grow, instead of a new tensor for every token.

    `DynamicLayer` copies everything at each step. Here a token is written into its column, and attention gets a view.
    Layers with a sliding window keep all tokens too: transformers' mask hides what is out of the window.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, length: int):
        """Takes buffers [R, A, capacity, D] whose first `length` columns are filled."""
        super().__init__()
        self.lazy_initialization(keys, values)
        self._buffers = [keys, values]
        self._show(length)

    def _show(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        self._length = length
        keys, values = (buffer[:, :, :length] for buffer in self._buffers)
        self.keys, self.values = keys, values
        return keys, values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends [R, A, 1, D] and returns all keys and values (transformers' other arguments are ignored)."""
        start, stop = self._length, self._length + key_states.shape[-2]
        for place, states in enumerate((key_states, value_states)):
            if stop > self._buffers[place].shape[-2]:
                self._buffers[place] = _widened(self._buffers[place][:, :, :start], stop + stop // 2)
            self._buffers[place][:, :, start:stop] = states
        return self._show(stop)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Keeps the sequences `beam_idx`."""
        for place, buffer in enumerate(self._buffers):
            kept = buffer.new_empty(len(beam_idx), *buffer.shape[1:])
            torch.index_select(buffer[:, :, : self._length], 0, beam_idx, out=kept[:, :, : self._length])
            self._buffers[place] = kept
        self._show(self._length)


def _widened(filled: torch.Tensor, capacity: int) -> torch.Tensor:
    """[R, A, L, D] copied into the front of [R, A, capacity, D]."""
    buffer = filled.new_empty(*filled.shape[:2], capacity, filled.shape[-1])
    buffer[:, :, : filled.shape[-2]] = filled
    return buffer


class PromptCache:
    """Keys and values of the distinct prompts, each computed once; a generation batch is copied out of it."""

    def __init__(self, config: PreTrainedConfig):
        """Finds out whether the model's layers can be stored in `GrowingLayer`s."""
        self._config = config
        plain = (DynamicLayer, DynamicSlidingWindowLayer)
        self.plain = all(type(layer) in plain for layer in DynamicCache(config=config).layers)
        """Whether all layers are attention with keys and values of their own. Others (recurrent states, layers that
        share keys) are left to transformers' own cache, whose prompts cannot be computed in several forwards."""
        self._microbatches: list[tuple[int, int, Cache]] = []

    def microbatch(self, start: int, stop: int) -> Cache:
        """An empty cache for the forward of prompts `start .. stop - 1`, left-padded."""
        # Without the config every layer keeps all its tokens, whatever its window.
        cache = DynamicCache() if self.plain else DynamicCache(config=self._config)
        self._microbatches.append((start, stop, cache))
        return cache

    def expanded(self, owners: torch.Tensor, width: int, room: int) -> Cache:
        """The cache of a generation batch.

        Args:
            owners: [R] int64, the prompt of each sequence.
            width: columns that the prompts take, right-aligned: the longest prompt of the batch where the layers are
                plain, of all prompts where not.
            room: columns to have free for completions (more are made when they run out).
        """
        if not self.plain:
            cache = copy.deepcopy(self._microbatches[0][-1])
            cache.reorder_cache(cast(torch.LongTensor, owners))
            return cache
        members = []
        for start, stop, _ in self._microbatches:
            rows = ((owners >= start) & (owners < stop)).nonzero()[:, 0]
            members.append((rows, owners[rows] - start))
        layers: list[Any] = []
        for layer in zip(*(cache.layers for *_, cache in self._microbatches), strict=True):
            keys = _gathered([part.keys for part in layer], members, len(owners), width, room)
            values = _gathered([part.values for part in layer], members, len(owners), width, room)
            layers.append(GrowingLayer(keys, values, width))
        return Cache(layers=layers)


def _gathered(
    parts: list[torch.Tensor], members: list[tuple[torch.Tensor, torch.Tensor]], rows: int, width: int, room: int
) -> torch.Tensor:
    """[R, A, width + room, D] from micro-batches [u, A, L, D] and, for each, its sequences and their prompts in it."""
    # Zeros: padding is masked out with weight 0, and 0 times uninitialised memory may be NaN.
    buffer = parts[0].new_zeros(rows, parts[0].shape[1], width + room, parts[0].shape[3])
    for part, (places, prompts) in zip(parts, members, strict=True):
        columns = min(width, part.shape[2])
        buffer[places, :, width - columns : width] = part[prompts, :, part.shape[2] - columns :]
    return buffer
