"""Flat batches: every token once, no padding, shared prompts kept once.

A batch is one row of N tokens cut into segments. A segment either stands alone or continues another segment, its
prefix, which may continue a third: segments form trees. An SFT sequence is one segment; a preference pair is a prompt
and two segments that continue it; a GRPO group is a prompt and its completions; turns that share a beginning are a
deeper tree. A segment's tokens attend causally to all segments that they continue and to themselves, to nothing else.
A row is the path from a root to one segment, and positions count along it.

This is the one place that shifts: target k is predicted by the hidden state at flat index `predictors[k]`, which for
the first token of a segment is the last token of its prefix. Everything after works on `[B, T]` with a mask. A target
of a segment that several rows go through (what both completions of a pair begin with) is computed once and is an entry
of each of these rows.

Legend: N tokens of the batch, K targets, M entries of the mask, B sequences (rows), T columns (of the longest row).
"""

from __future__ import annotations

import itertools
from array import array
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
    sources: torch.Tensor  # [M] number of the target at each entry; K = M unless rows have targets in common
    rows: torch.Tensor  # [M] row of each entry
    columns: torch.Tensor  # [M] column of each entry
    mask: torch.Tensor  # [B, T] True at the entries
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
        flat = torch.tensor(list(itertools.chain.from_iterable(values)), dtype=torch.get_default_dtype())
        lengths = torch.tensor([len(row) for row in values], dtype=torch.long)
        padded = flat.new_zeros(self.mask.shape)
        padded[torch.arange(padded.shape[1]) < lengths[:, None]] = flat
        return padded.to(self.mask.device).masked_fill(~self.mask, 0.0)

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


Node = tuple[Sequence[int], Sequence[int] | None, int]  # (ids, which of them are targets, number of the parent or -1)


def _pack(nodes: Sequence[Node], rows: Sequence[tuple[int, int]], numbers: Iterable[int] = ()) -> PackedBatch:
    """One segment per node, a parent before its children; one row per (node that ends it, tokens before column 0).

    A flagged token that nothing precedes has no predictor and is no target.
    """
    segments: list[Segment] = []
    firsts: list[int] = []  # position of a segment's first token
    lasts: list[int] = []  # flat index of the last token of the path that a segment ends, -1 for no token
    num_tokens = 0
    for ids, _, parent in nodes:
        firsts.append(firsts[parent] + segments[parent].length if parent >= 0 else 0)
        segments.append(Segment(num_tokens, len(ids), parent))
        num_tokens += len(ids)
        lasts.append(num_tokens - 1 if len(ids) else lasts[parent] if parent >= 0 else -1)

    starts, lengths, prefixes = torch.tensor(segments, dtype=torch.long).unbind(1)
    flat = torch.arange(num_tokens)
    position_ids = flat - (starts - torch.tensor(firsts)).repeat_interleave(lengths)
    filled = lengths > 0
    previous = flat - 1  # of each token in its path
    previous[starts[filled]] = torch.tensor([*lasts, -1])[prefixes[filled]]  # prefix -1: the -1 at the end

    input_ids = _to_tensor([ids for ids, _, _ in nodes], "i").long()
    flags = [bytes(len(ids)) if is_target is None else is_target for ids, is_target, _ in nodes]
    is_target = _to_tensor(flags, "b").bool() & (previous >= 0)
    targets = is_target.nonzero()[:, 0]  # [K] flat indices
    before = torch.cat([targets.new_zeros(1), is_target.cumsum(0)])  # targets before each token
    first_targets, end_targets = before[starts].tolist(), before[starts + lengths].tolist()

    runs: list[tuple[int, int, int]] = []  # (row, first target, number of targets) along each row's path
    for row, (node, _) in enumerate(rows):
        path = []
        while node >= 0:
            path.append((row, first_targets[node], end_targets[node] - first_targets[node]))
            node = segments[node].prefix
        runs += reversed(path)
    run_rows, run_firsts, run_lengths = torch.tensor(runs, dtype=torch.long).view(-1, 3).unbind(1)
    skipped = run_firsts - (run_lengths.cumsum(0) - run_lengths)
    sources = torch.arange(int(run_lengths.sum())) + skipped.repeat_interleave(run_lengths)
    entry_rows = run_rows.repeat_interleave(run_lengths)
    row_offsets = torch.tensor([offset for _, offset in rows], dtype=torch.long)
    columns = position_ids[targets[sources]] - row_offsets[entry_rows]

    width = max((firsts[node] + segments[node].length - offset for node, offset in rows), default=0)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    mask[entry_rows, columns] = True
    return PackedBatch(
        input_ids=input_ids[None],
        position_ids=position_ids[None],
        segments=tuple(segments),
        row_segments=tuple(node for node, _ in rows),
        row_offsets=row_offsets,
        predictors=previous[targets],
        targets=input_ids[targets],
        sources=sources,
        rows=entry_rows,
        columns=columns,
        mask=mask,
        numbers=tuple(dict.fromkeys(numbers)),
    )


def _to_tensor(pieces: Sequence[Sequence[int]], typecode: str) -> torch.Tensor:
    """All pieces one after the other, copied whole where they are arrays of the type already."""
    joined = array(typecode)
    for piece in pieces:
        joined.frombytes(piece) if isinstance(piece, bytes) else joined.extend(piece)
    dtype = {"i": torch.int32, "b": torch.int8}[typecode]
    return torch.frombuffer(joined, dtype=dtype) if joined else torch.empty(0, dtype=dtype)


def pack_examples(examples: Sequence[Example]) -> PackedBatch:
    """SFT sequences, one segment and one row each; column t is token t (token 0 has no predictor, so no target)."""
    nodes = [(example.input_ids, example.is_target, -1) for example in examples]
    rows = [(node, 0) for node in range(len(nodes))]
    return _pack(nodes, rows, [example.number for example in examples]) if nodes else empty_batch()


def pack_groups(
    groups: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]],
    is_target: Sequence[Sequence[bool]] | None = None,
    numbers: Iterable[int] = (),
) -> PackedBatch:
    """(prompt ids, completions' ids) groups: the prompt once, then every completion; one row per completion, in order.

    is_target: one flag per token of each completion, False for context (tool output) and for rows that are left out of
    the loss; without it every token is a target. Prompts need a token.
    """
    nodes: list[Node] = []
    rows: list[tuple[int, int]] = []
    for prompt_ids, completions in groups:
        prompt = len(nodes)
        nodes.append((prompt_ids, None, -1))
        for ids in completions:
            flags = b"\1" * len(ids) if is_target is None else is_target[len(rows)]
            rows.append((len(nodes), len(prompt_ids)))
            nodes.append((ids, flags, prompt))
    return _pack(nodes, rows, numbers) if nodes else empty_batch()


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
    completion. The prompt and what both completions begin with are one segment, and its targets count in both rows."""
    nodes: list[Node] = []
    rows: list[tuple[int, int]] = []
    for pair in pairs:
        shared, offset, begin = pair.num_shared, len(pair.prompt_ids), len(nodes)
        completions = pair.completions()
        (ids, is_target), _ = completions
        nodes.append(([*pair.prompt_ids, *ids[:shared]], [*bytes(offset), *is_target[:shared]], -1))
        for ids, is_target in completions:
            rows.append((len(nodes), offset))
            nodes.append((ids[shared:], is_target[shared:], begin))
    return _pack(nodes, rows, [pair.number for pair in pairs]) if nodes else empty_batch()


def pack_tree(nodes: Sequence[Node], ends: Sequence[int] | None = None, numbers: Iterable[int] = ()) -> PackedBatch:
    """Trees of segments, such as rollouts that share their first turns: one row per path from a root to a node.

    nodes: (ids, is_target, parent), a parent before its children, -1 for a root; a target counts in every row that
    goes through its node. ends: the node that ends each row, by default every leaf in order. Column 0 of a row is the
    first token after its root, so a root (a prompt) has no targets.
    """
    parents = {parent for _, _, parent in nodes}
    roots: list[int] = []
    for node, (_, _, parent) in enumerate(nodes):
        roots.append(roots[parent] if parent >= 0 else node)
    leaves = [node for node in range(len(nodes)) if node not in parents]
    rows = [(node, len(nodes[roots[node]][0])) for node in (leaves if ends is None else ends)]
    nodes = [(ids, is_target if parent >= 0 else None, parent) for ids, is_target, parent in nodes]
    return _pack(nodes, rows, numbers) if nodes else empty_batch()


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
    return _pack([([0], None, -1)], [])
