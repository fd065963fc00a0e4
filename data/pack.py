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

import bisect
import heapq
import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch

from data.chat import Example, Pair


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How many rows one optimizer step takes and how they are cut into micro-batches.

    A row is a sequence (SFT), a pair (DPO) or a completion (GRPO). The step's rows never depend on how they are cut,
    unless they are drawn in bins (`packing_strategy`).
    """

    per_device_train_batch_size: int = 8
    """Rows of one micro-batch on one process."""
    gradient_accumulation_steps: int = 1
    """Micro-batches of one optimizer step on one process."""
    train_batch_size: int = 0
    """Rows of one optimizer step over all processes; 0 means: per_device_train_batch_size x
    gradient_accumulation_steps x processes."""
    max_tokens_per_batch: int = 0
    """Cut micro-batches by this many tokens (a longer row stands alone) and not by per_device_...; 0 is off."""
    packing: bool = True
    """Flat batches without padding, shared prompts computed once; false: the plain padded forward."""
    packing_strategy: str = "step"
    """`step`: rows are drawn by seed, and fill micro-batches within their step. `best_fit`, `bfd` (SFT): all rows are
    put once into bins of max_tokens_per_batch, in an order drawn by seed or longest first; bins are drawn, and each is
    one micro-batch, so per_device_train_batch_size means nothing and train_batch_size counts bins. `bfd` needs a
    few bins less, but rows of like length meet in them, so steps of few bins are lopsided."""

    def __post_init__(self) -> None:
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give 1 or more.")
        for name in ("train_batch_size", "max_tokens_per_batch"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give 0 (off) or more.")
        if self.packing_strategy not in ("step", "best_fit", "bfd"):
            raise ValueError(f"packing_strategy is {self.packing_strategy!r}; give step, best_fit or bfd.")
        if self.in_bins and not (self.packing and self.max_tokens_per_batch):
            raise ValueError(
                f"packing_strategy: {self.packing_strategy} fills packed batches of max_tokens_per_batch tokens; set "
                "packing: true and max_tokens_per_batch above 0, or packing_strategy: step."
            )
        if self.max_tokens_per_batch and not self.packing:
            raise ValueError("max_tokens_per_batch counts the tokens of packed batches; set packing: true, or 0 here.")

    @property
    def in_bins(self) -> bool:
        """Whether steps draw bins of rows, not rows."""
        return self.packing_strategy != "step"

    def rows_per_step(self, num_processes: int) -> int:
        """Rows (or bins) of one optimizer step over all processes.

        Raises ValueError where bins cannot be shared equally, so that some process would always run an empty batch.
        """
        if self.in_bins and self.train_batch_size % num_processes:
            raise ValueError(
                f"train_batch_size is {self.train_batch_size} and counts bins with packing_strategy: "
                f"{self.packing_strategy}; give a multiple of the {num_processes} processes, or 0."
            )
        per_batch = 1 if self.in_bins else self.per_device_train_batch_size
        return self.train_batch_size or per_batch * self.gradient_accumulation_steps * num_processes

    def refuse_bins(self) -> None:
        """Raise ValueError where bins are asked for, in loops whose rows are more than one sequence."""
        if self.in_bins:
            strategy = self.packing_strategy
            raise ValueError(f"packing_strategy: {strategy} is for SFT, whose rows are single sequences; give step.")


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
        """Values of the targets [K] laid out as [B, T], zero elsewhere."""
        return self.place(values.index_select(0, self.sources))

    def place(self, values: torch.Tensor) -> torch.Tensor:
        """One value per place [M] laid out as [B, T], zero elsewhere."""
        return values.new_zeros(self.mask.shape).index_put((self.rows, self.columns), values)

    def lay_out(self, values: Sequence[Sequence[float]]) -> torch.Tensor:
        """One list of numbers a row (`values[b][t]` belongs to column t) as fp32 [B, T], zero outside the mask."""
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
    trained: Sequence[bool] | None = None,
    numbers: Iterable[int] = (),
) -> PackedBatch:
    """(prompt ids, completions' ids) groups: the prompt once, then every completion; one row a completion, in order.

    trained: one flag a row; False leaves its tokens out of the targets (its mask row is empty). Prompts need a token.
    """
    if not groups:
        return empty_batch()
    builder = _Builder()
    for prompt_ids, completions in groups:
        prompt = builder.segment(prompt_ids)
        for ids in completions:
            wanted = trained is None or trained[len(builder.row_segments)]
            segment = builder.segment(ids, prompt)
            places = builder.train(segment, [wanted] * len(ids))
            builder.row(segment, *places, offset=len(prompt_ids), width=len(ids))
    return builder.batch(numbers)


def pack_completions(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    trained: Sequence[bool],
    numbers: Iterable[int] = (),
) -> PackedBatch:
    """One (prompt ids, completion ids) a row; neighbours with the very same prompt object share its segment."""
    groups: list[tuple[Sequence[int], list[Sequence[int]]]] = []
    for prompt, completion in zip(prompts, completions, strict=True):
        if not groups or groups[-1][0] is not prompt:
            groups.append((prompt, []))
        groups[-1][1].append(completion)
    return pack_groups(groups, trained, numbers)


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


def cut_microbatches(
    lengths: Sequence[int], *, max_rows: int, max_tokens: int = 0, prompts: Sequence[Sequence[int]] | None = None
) -> list[range]:
    """Consecutive runs of rows: at most `max_rows` each, or, when `max_tokens` > 0, at most that many tokens.

    prompts: what each row continues, counted once where neighbours of a run have the very same prompt object. A row
    longer than `max_tokens` stands alone. Rows keep their order, so the cut never decides which rows a step has.
    """
    cuts, begin, tokens = [], 0, 0
    for i, length in enumerate(lengths):
        prompt = len(prompts[i]) if prompts else 0
        shared = prompts is not None and i > begin and prompts[i] is prompts[i - 1]
        added = length + (0 if shared else prompt)
        full = tokens + added > max_tokens if max_tokens else i - begin >= max_rows
        if i > begin and full:
            cuts.append(range(begin, i))
            begin, tokens, added = i, 0, length + prompt
        tokens += added
    if begin < len(lengths):
        cuts.append(range(begin, len(lengths)))
    return cuts


def best_fit(lengths: Sequence[int], max_tokens: int, order: Iterable[int] | None = None) -> list[list[int]]:
    """Rows in few bins of `max_tokens`: each goes into the fullest bin that still has room (the first of them), or
    opens one. A longer row stands alone. A million rows take seconds: bins with the same room wait together, so what
    is searched has at most `max_tokens` entries.

    order: in which rows come; default: longest first, best-fit decreasing.
    """
    bins: list[list[int]] = []
    waiting: dict[int, list[int]] = defaultdict(list)  # free tokens -> heap of bins
    rooms: list[int] = []  # free tokens for which a bin waits, ascending
    for row in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True) if order is None else order:
        place = bisect.bisect_left(rooms, lengths[row])
        if place < len(rooms):
            free = rooms[place]
            number = heapq.heappop(waiting[free])
            if not waiting[free]:
                del rooms[place]
        else:
            free, number = max_tokens, len(bins)
            bins.append([])
        bins[number].append(row)
        free -= lengths[row]
        if free > 0:
            if not waiting[free]:
                bisect.insort(rooms, free)
            heapq.heappush(waiting[free], number)
    return bins


def pack_rows(examples: Sequence[Example], config: BatchConfig, *, seed: int) -> tuple[list[list[Example]], str]:
    """The bins that steps draw, and in a few words how they came about; for `step`, every example alone.

    Two bins never fit into one micro-batch, or the second had not been opened; so `cut_step`, given bins in the place
    of rows, keeps each of them whole and alone.
    """
    if not config.in_bins:
        return [[example] for example in examples], config.packing_strategy
    lengths, size = [len(example.input_ids) for example in examples], config.max_tokens_per_batch
    order = None
    if config.packing_strategy == "best_fit":
        order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    bins = best_fit(lengths, size, order)
    filled = sum(min(sum(lengths[row] for row in rows), size) for rows in bins) / (len(bins) * size)
    text = f"{config.packing_strategy}, {len(lengths)} rows in {len(bins)} bins of {size} tokens"
    return [[examples[row] for row in rows] for rows in bins], f"{text}, {100 * filled:.1f} % full"


def cut_step(
    lengths: Sequence[int], *, rank: int, num_processes: int, max_rows: int, max_tokens: int = 0
) -> list[list[int]]:
    """Micro-batches of this process, as places in the step; every process gets the same number (some may be empty).

    lengths: tokens of each row of the step, or of each bin.
    """
    cuts = []
    for process in range(num_processes):
        share = share_of_rank(lengths, rank=process, num_processes=num_processes)
        own = [lengths[i] for i in share]
        runs = best_fit(own, max_tokens) if max_tokens else cut_microbatches(own, max_rows=max_rows)
        cuts.append([[share[i] for i in run] for run in runs])
    return cuts[rank] + [[]] * (max(map(len, cuts)) - len(cuts[rank]))


def rows_of_step(step: int, *, num_rows: int, rows_per_step: int, seed: int) -> list[int]:
    """Row numbers of optimizer step `step` (from 0), the same on every process and after every resume.

    Each epoch is one permutation, drawn from (seed, epoch); its last step takes the rows that are left, be they fewer
    than `rows_per_step`, so every row is seen once an epoch. Nothing is stored: the position in the data is the step.
    """
    per_epoch = steps_per_epoch(num_rows, rows_per_step)
    epoch, place = divmod(step, per_epoch)
    order = _permutation(num_rows, seed * 1_000_003 + epoch)
    return order[place * rows_per_step : (place + 1) * rows_per_step].tolist()


@lru_cache(maxsize=2)  # the epoch's, and the next one's where sampling runs ahead
def _permutation(count: int, seed: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def steps_per_epoch(num_rows: int, rows_per_step: int) -> int:
    """Optimizer steps that one pass over the rows takes."""
    return -(-num_rows // rows_per_step)


def share_of_rank(lengths: Sequence[int], *, rank: int, num_processes: int) -> list[int]:
    """Places (in the step) of the rows that this process takes: counts differ by at most one, tokens are balanced.

    Rows are dealt in order of length, forth and back over the processes; shorter rows first within a process keeps
    micro-batches even.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    mine = []
    for place, row in enumerate(order):
        turn, seat = divmod(place, num_processes)
        if (seat if turn % 2 == 0 else num_processes - 1 - seat) == rank:
            mine.append(row)
    return mine
