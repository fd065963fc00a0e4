"""Which rows an optimizer step takes, which of them each process takes, and how they are cut into micro-batches."""

from __future__ import annotations

import bisect
import heapq
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from data.chat import Example


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How many rows one optimizer step takes and how they are cut into micro-batches.

    A row is a sequence (SFT), a pair (DPO) or a completion (GRPO). The step's rows never depend on how they are cut,
    unless steps draw bins of rows (`packing_strategy`).
    """

    per_device_train_batch_size: int = 8
    """Rows of one micro-batch on one process."""
    gradient_accumulation_steps: int = 1
    """Micro-batches of one optimizer step on one process."""
    train_batch_size: int = 0
    """Rows of one optimizer step over all processes; 0 means: per_device_train_batch_size x
    gradient_accumulation_steps x processes."""
    max_tokens_per_batch: int = 0
    """Tokens of one micro-batch, instead of per_device_train_batch_size (a longer row is one by itself); 0: off."""
    packing: bool = True
    """Flat batches without padding, shared prompts computed once; false: the plain padded forward."""
    packing_strategy: str = "step"
    """`step`: each step draws rows and packs them into its micro-batches. `best_fit`, `bfd` (SFT): before training all
    rows are put into bins of max_tokens_per_batch (best_fit: in random order; bfd: longest first). Steps draw bins, a
    bin is one micro-batch, train_batch_size counts bins and per_device_train_batch_size has no effect. `bfd` needs
    slightly fewer bins, but puts rows of similar length together, so small steps vary more."""

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

        Raises ValueError where the bins of a step cannot be divided equally among the processes.
        """
        if self.in_bins and self.train_batch_size % num_processes:
            raise ValueError(
                f"train_batch_size is {self.train_batch_size} and counts bins with packing_strategy: "
                f"{self.packing_strategy}; give a multiple of the {num_processes} processes, or 0."
            )
        per_batch = 1 if self.in_bins else self.per_device_train_batch_size
        return self.train_batch_size or per_batch * self.gradient_accumulation_steps * num_processes

    def refuse_bins(self) -> None:
        """Raise ValueError for bins; DPO and GRPO call it, since their rows are more than one sequence."""
        if self.in_bins:
            strategy = self.packing_strategy
            raise ValueError(f"packing_strategy: {strategy} is for SFT, whose rows are single sequences; give step.")


def cut_microbatches(
    lengths: Sequence[int], *, max_rows: int, max_tokens: int = 0, prompts: Sequence[Sequence[int]] | None = None
) -> list[range]:
    """Consecutive runs of rows: at most `max_rows` each, or, when `max_tokens` > 0, at most that many tokens.

    prompts: the prompt of each row, counted once for neighbours in a run with the same prompt object. A row longer than
    `max_tokens` is a run by itself. Rows keep their order.
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
    """Best-fit bin packing: each row goes into the fullest bin that has room (the first of them), or into a new bin.

    A row longer than `max_tokens` gets a bin for itself. Bins with equal room are kept together, so a search looks at
    `max_tokens` entries or fewer: a million rows take seconds. order: of the rows; default: longest first (best-fit
    decreasing).
    """
    bins: list[list[int]] = []
    waiting: dict[int, list[int]] = defaultdict(list)  # free tokens -> heap of bins
    rooms: list[int] = []  # free tokens for which a bin waits, ascending
    for row in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True) if order is None else order:
        index = bisect.bisect_left(rooms, lengths[row])
        if index < len(rooms):
            free = rooms[index]
            number = heapq.heappop(waiting[free])
            if not waiting[free]:
                del rooms[index]
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


def build_bins(examples: Sequence[Example], config: BatchConfig, *, seed: int) -> tuple[list[list[Example]], str]:
    """The bins that steps draw, and a description for the log; for `step` each example is a bin.

    Two bins together never fit into `max_tokens_per_batch`, or best-fit would not have opened the second. So
    `cut_step`, given the bins' lengths, makes each bin one micro-batch.
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
    """Micro-batches of this process, as indices into the step's rows; as many on every process (some may be empty).

    lengths: tokens of each row of the step, or of each bin.
    """
    shares = _assign_rows(lengths, num_processes)
    share = [row for row in shares[:, rank].tolist() if row >= 0]
    own = [lengths[row] for row in share]
    if max_tokens:
        runs: Sequence[Sequence[int]] = best_fit(own, max_tokens, range(len(own)))
        count = len(runs) if num_processes == 1 else _most_bins(lengths, shares, max_tokens)
    else:
        runs, count = cut_microbatches(own, max_rows=max_rows), -(-len(shares) // max_rows)
    return [[share[i] for i in run] for run in runs] + [[]] * (count - len(runs))


def _most_bins(lengths: Sequence[int], shares: torch.Tensor, max_tokens: int) -> int:
    """The largest number of bins that `best_fit` makes of a process's rows, for all processes at once.

    shares: [laps, processes], from `_assign_rows`.
    """
    tokens = torch.tensor([*lengths, 0])[shares].clamp(max=max_tokens)  # row -1 has no tokens
    num_bins = 2 * int(tokens.sum(0).max()) // max_tokens + 2  # any two bins of a process are more than one bin full
    free = torch.full((shares.shape[1], num_bins), max_tokens)  # [processes, bins]; unopened bins are the emptiest
    for lap in tokens:
        room, fullest = torch.where(free >= lap[:, None], free, max_tokens + 1).min(dim=1)
        free.scatter_(1, fullest[:, None], (room - lap)[:, None])
    return int((free < max_tokens).sum(dim=1).max())


def rows_of_step(step: int, *, num_rows: int, rows_per_step: int, seed: int) -> list[int]:
    """Row numbers of optimizer step `step` (from 0), the same on every process and after every resume.

    Each epoch is one permutation, drawn from (seed, epoch). Its last step takes the remaining rows, which may be fewer
    than `rows_per_step`, so every row is seen once per epoch. No state is saved: the step is the position in the data.
    """
    per_epoch = steps_per_epoch(num_rows, rows_per_step)
    epoch, index = divmod(step, per_epoch)
    order = _permutation(num_rows, seed * 1_000_003 + epoch)
    return order[index * rows_per_step : (index + 1) * rows_per_step].tolist()


@lru_cache(maxsize=2)  # this epoch's, and the next epoch's where rollouts are prefetched
def _permutation(count: int, seed: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def steps_per_epoch(num_rows: int, rows_per_step: int) -> int:
    """Optimizer steps that one pass over the rows takes."""
    return -(-num_rows // rows_per_step)


def share_of_rank(lengths: Sequence[int], *, rank: int, num_processes: int) -> list[int]:
    """Indices (into the step's rows) that this process takes: counts differ by at most one, tokens are balanced.

    Rows are assigned in snake order, longest first: processes 0 .. n-1, then n-1 .. 0, and so on.
    """
    return [row for row in _assign_rows(lengths, num_processes)[:, rank].tolist() if row >= 0]


def _assign_rows(lengths: Sequence[int], num_processes: int) -> torch.Tensor:
    """[laps, processes] the rows of each process, longest first; -1 where the last lap has none left."""
    order = torch.tensor(lengths, dtype=torch.long).sort(descending=True, stable=True).indices
    laps = -(-len(order) // num_processes)
    shares = torch.nn.functional.pad(order, (0, laps * num_processes - len(order)), value=-1).view(laps, num_processes)
    shares[1::2] = shares[1::2].flip(1)
    return shares
