"""Flat batches: every token once, no padding, shared prompts kept once.

A batch is one row of N tokens cut into segments. A segment either stands alone or continues one other segment, its
prefix: an SFT sequence is one segment; a preference pair is a prompt and two segments that continue it; a GRPO group is
a prompt and its completions. A segment's tokens attend causally to its prefix, then to themselves, and to nothing else.

This is the one place that shifts: target k is predicted by the hidden state at flat index `predictors[k]`, which for
the first token of a completion is the last token of its prompt. Everything after works on `[B, T]` with a mask. A
target of a segment that several rows continue (what both completions of a pair begin with) is computed once and stands
in each of these rows.

Legend: N tokens of the batch, K targets, M places of targets, B sequences (rows), T columns (of the longest row).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from data.chat import Example, Pair


class Segment(NamedTuple):
    """Tokens `start .. start+length-1` of the flat row; `prefix` is the segment that they continue, or -1."""

    start: int
    length: int
    prefix: int


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch; see the module's docstring."""

    input_ids: torch.Tensor  # [1, N]
    position_ids: torch.Tensor  # [1, N], running on from the prefix
    segments: tuple[Segment, ...]
    row_segments: tuple[int, ...]  # [B] the segment that ends each row
    row_offsets: torch.Tensor  # [B] tokens of the row before column 0
    predictors: torch.Tensor  # [K] flat index of the hidden state that predicts each target
    targets: torch.Tensor  # [K] token ids
    sources: torch.Tensor  # [M] number of the target at each place; K = M unless rows have targets in common
    rows: torch.Tensor  # [M] the places in [B, T]
    columns: torch.Tensor  # [M]
    mask: torch.Tensor  # [B, T] True where a target stands
    numbers: tuple[int, ...] = ()  # of the data's rows that are in it, for messages

    @property
    def num_tokens(self) -> int:
        """Tokens that are computed: shared prompts count once."""
        return self.input_ids.shape[1]

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on another device."""
        names = "input_ids position_ids row_offsets predictors targets sources rows columns mask".split()
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return replace(self, **moved)

    def scatter(self, values: torch.Tensor) -> torch.Tensor:
        """One value per target [K] to [B, T], zero outside the mask."""
        return self.scatter_entries(values.index_select(0, self.sources))

    def scatter_entries(self, values: torch.Tensor) -> torch.Tensor:
        """One value per entry of the mask [M] to [B, T], zero outside the mask."""
        return values.new_zeros(self.mask.shape).index_put((self.rows, self.columns), values)

    def to_padded(self, values: Sequence[Sequence[float]]) -> torch.Tensor:
        """Ragged lists (`values[b][t]` belongs to column t) to fp32 [B, T], zero outside the mask."""
        laid = torch.zeros(self.mask.shape)
        for b, row in enumerate(values):
            laid[b, : len(row)] = torch.tensor(row)
        return laid.to(self.mask.device).masked_fill(~self.mask, 0.0)

    def padded(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same rows as a plain right-padded batch: (input_ids [B, L], attention_mask [B, L], predictors [M])."""
        whole = []
        for number in self.row_segments:
            parts: list[torch.Tensor] = []
            while number >= 0:
                start, length, number = self.segments[number]
                parts.insert(0, self.input_ids[0, start : start + length])
            whole.append(torch.cat(parts))
        input_ids = self.input_ids.new_zeros(len(whole), max(map(len, whole), default=0))
        attention_mask = torch.zeros_like(input_ids)
        for b, ids in enumerate(whole):
            input_ids[b, : len(ids)] = ids
            attention_mask[b, : len(ids)] = 1
        return input_ids, attention_mask, self.row_offsets[self.rows] + self.columns - 1


class _Builder:
    """Collects segments and targets, then makes the tensors in one go."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.segments: list[Segment] = []
        self.row_segments: list[int] = []
        self.row_offsets: list[int] = []
        self.predictors: list[int] = []
        self.targets: list[int] = []
        self.sources: list[int] = []
        self.rows: list[int] = []
        self.columns: list[int] = []
        self.width = 0

    def segment(self, ids: Sequence[int], prefix: int = -1) -> int:
        """Append a segment; returns its number."""
        first = self.segments[prefix].length if prefix >= 0 else 0
        self.segments.append(Segment(len(self.ids), len(ids), prefix))
        self.ids.extend(ids)
        self.positions.extend(range(first, first + len(ids)))
        return len(self.segments) - 1

    def train(self, number: int, is_target: Sequence[bool], skip: int = 0) -> tuple[list[int], list[int]]:
        """Make the flagged tokens of a segment targets, `is_target[0]` being token `skip`; the first token of a segment
        without prefix has no predictor and is none. Returns (numbers of the targets, places of their flags)."""
        start, _, prefix = self.segments[number]
        places = [t for t, wanted in enumerate(is_target) if wanted and (t + skip or prefix >= 0)]
        known, first = len(self.targets), start + skip
        self.targets.extend([self.ids[first + t] for t in places])
        self.predictors.extend([first + t - 1 for t in places])
        if places and first + places[0] == start:  # a segment's first token is predicted by its prefix's last one
            self.predictors[known] = self.segments[prefix].start + self.segments[prefix].length - 1
        return list(range(known, len(self.targets))), places

    def row(self, segment: int, sources: Sequence[int], columns: Sequence[int], *, offset: int, width: int) -> None:
        """End a row with `segment`: target `sources[i]` stands in column `columns[i]` of `width`, the row's token
        `offset + columns[i]`."""
        self.rows.extend([len(self.row_segments)] * len(columns))
        self.row_segments.append(segment)
        self.row_offsets.append(offset)
        self.sources.extend(sources)
        self.columns.extend(columns)
        self.width = max(self.width, width)

    def batch(self, numbers: Iterable[int] = ()) -> PackedBatch:
        names = ("row_offsets", "predictors", "targets", "sources", "rows", "columns")
        tensors = {name: torch.tensor(getattr(self, name), dtype=torch.long) for name in names}
        mask = torch.zeros(len(self.row_segments), self.width, dtype=torch.bool)
        mask[tensors["rows"], tensors["columns"]] = True
        return PackedBatch(
            input_ids=torch.tensor([self.ids], dtype=torch.long),
            position_ids=torch.tensor([self.positions], dtype=torch.long),
            segments=tuple(self.segments),
            row_segments=tuple(self.row_segments),
            mask=mask,
            numbers=tuple(dict.fromkeys(numbers)),
            **tensors,
        )


def pack_examples(examples: Sequence[Example]) -> PackedBatch:
    """SFT sequences, one segment and one row each; column t is token t (token 0 has no predictor, so no target)."""
    if not examples:
        return empty_batch()
    builder = _Builder()
    for example in examples:
        segment = builder.segment(example.input_ids)
        builder.row(segment, *builder.train(segment, example.is_target), offset=0, width=len(example.input_ids))
    return builder.batch(example.number for example in examples)


def pack_groups(
    groups: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]],
    is_target: Sequence[Sequence[bool]] | None = None,
    numbers: Iterable[int] = (),
) -> PackedBatch:
    """(prompt ids, completions' ids) groups: the prompt once, then every completion; one row a completion, in order.

    is_target: one flag per token of each completion, False for context (tool output) and for rows that are left out of
    the loss; without it every token is a target. Prompts need a token.
    """
    if not groups:
        return empty_batch()
    builder = _Builder()
    for prompt_ids, completions in groups:
        prompt = builder.segment(prompt_ids)
        for ids in completions:
            flags = [True] * len(ids) if is_target is None else is_target[len(builder.row_segments)]
            segment = builder.segment(ids, prompt)
            places = builder.train(segment, flags)
            builder.row(segment, *places, offset=len(prompt_ids), width=len(ids))
    return builder.batch(numbers)


def pack_completions(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    is_target: Sequence[Sequence[bool]] | None = None,
    numbers: Iterable[int] = (),
) -> PackedBatch:
    """One (prompt ids, completion ids) per row; neighbours with the very same prompt object share its segment.

    is_target: as in `pack_groups`.
    """
    groups: list[tuple[Sequence[int], list[Sequence[int]]]] = []
    for prompt, completion in zip(prompts, completions, strict=True):
        if not groups or groups[-1][0] is not prompt:
            groups.append((prompt, []))
        groups[-1][1].append(completion)
    return pack_groups(groups, is_target, numbers)


def pack_pairs(pairs: Sequence[Pair]) -> PackedBatch:
    """Preference pairs; rows 2p and 2p+1 are the chosen and the rejected completion of pair p, column t is token t of a
    completion. The prompt and what both completions begin with are one segment, and its targets stand in both rows."""
    if not pairs:
        return empty_batch()
    builder = _Builder()
    for pair in pairs:
        shared, offset = pair.num_shared, len(pair.prompt_ids)
        completions = pair.completions()
        begin = builder.segment([*pair.prompt_ids, *pair.chosen_ids[:shared]])
        sources, columns = builder.train(begin, completions[0][1][:shared], skip=offset)
        for ids, is_target in completions:
            segment = builder.segment(ids[shared:], begin)
            own, places = builder.train(segment, is_target[shared:])
            places = columns + [shared + t for t in places]
            builder.row(segment, sources + own, places, offset=offset, width=len(ids))
    return builder.batch(pair.number for pair in pairs)


def pack_check(rows: Sequence[Sequence[int]], longest: int) -> PackedBatch:
    """What the self-check compares two forwards on: two groups made of the first rows' last tokens, each a prompt that
    two completions share. Their longest rows have 80 and 53 tokens (repeated where a row has fewer), at most `longest`.
    """
    groups = []
    for ids, length in zip([*rows, *rows], (80, 53), strict=False):
        tokens = list(itertools.islice(itertools.cycle(ids[-80:]), max(2, min(length, longest))))
        half = len(tokens) // 2
        groups.append((tokens[:half], (tokens[half:], tokens[: -(-half // 2)])))
    return pack_groups(groups)


def empty_batch() -> PackedBatch:
    """One token, no rows, no targets: what a process runs that has nothing to do, so that all run the same forwards."""
    builder = _Builder()
    builder.segment([0])
    return builder.batch()
