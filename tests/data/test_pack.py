"""Packing: every token once, the shift once, rows and counts that never depend on how they are cut."""

import bisect
import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from data.batches import (
    BatchConfig,
    best_fit,
    build_bins,
    cut_microbatches,
    cut_step,
    rows_of_step,
    share_of_rank,
    steps_per_epoch,
)
from data.chat import Example, Pair
from data.pack import empty_batch, pack_examples, pack_groups, pack_pairs, pack_tree

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
BFD = {"packing_strategy": "bfd", "max_tokens_per_batch": 64}
IN_BINS = pytest.mark.parametrize("strategy", ["best_fit", "bfd"])


def test_a_group_keeps_its_prompt_once():
    """Prompt 5 6 7 with completions 8 9 and 8: six tokens; the first token of both is predicted by token 2 (the 7)."""
    batch = pack_groups([([5, 6, 7], [[8, 9], [8]])])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 8]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3]]
    assert batch.predictors.tolist() == [2, 3, 2] and batch.targets.tolist() == [8, 9, 8]
    assert batch.mask.tolist() == [[True, True], [True, False]]
    assert batch.scatter(torch.tensor([1.0, 2.0, 3.0])).tolist() == [[1.0, 2.0], [3.0, 0.0]]


def test_the_stop_token_is_a_target():
    batch = pack_pairs([Pair([1], [3, 2], [4, 2])])
    assert batch.targets.tolist() == [3, 2, 4, 2]


def test_the_first_token_of_an_example_has_no_predictor():
    batch = pack_examples([Example([5, 6, 7], [True, False, True])])
    assert batch.predictors.tolist() == [1] and batch.targets.tolist() == [7]
    assert batch.mask.tolist() == [[False, False, True]]


def test_padded_rows_are_the_same_sequences():
    batch = pack_groups([([5, 6], [[8, 9, 3], [4]]), ([7], [[1, 2]])])
    ids, attention, predictors = batch.padded()
    assert ids.tolist() == [[5, 6, 8, 9, 3], [5, 6, 4, 0, 0], [7, 1, 2, 0, 0]]
    assert attention.sum(1).tolist() == [5, 3, 3]
    assert predictors.tolist() == [1, 2, 3, 1, 0, 1]
    assert torch.equal(ids[batch.rows, predictors + 1], batch.targets)


def test_untrained_rows_have_no_targets_but_keep_their_place():
    batch = pack_groups([([5], [[8], [9]])], is_target=[[False], [True]])
    assert batch.mask.tolist() == [[False], [True]] and batch.targets.tolist() == [9]


# (ids, is_target, parent): a prompt, two first turns, what tools said to the first of them, two second turns; a third
TREE = [
    ([5, 6], [False, False], -1),
    ([7, 8], [True, True], 0),
    ([9], [True], 0),
    ([10, 11], [False, False], 1),
    ([12], [True], 3),
    ([13, 14], [True, False], 3),
]


def test_positions_of_a_tree_run_on_from_the_whole_path():
    """Nodes at depths 0, 1, 1, 2, 3, 3: tokens 5 6 | 7 8 | 9 | 10 11 | 12 | 13 14."""
    batch = pack_tree(TREE)
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 4, 5, 6, 6, 7]]
    assert batch.predictors.tolist() == [1, 2, 1, 6, 6] and batch.targets.tolist() == [7, 8, 9, 12, 13]
    ids, attention, predictors = batch.padded()
    assert ids.tolist() == [[5, 6, 9, 0, 0, 0, 0, 0], [5, 6, 7, 8, 10, 11, 12, 0], [5, 6, 7, 8, 10, 11, 13, 14]]
    assert attention.sum(1).tolist() == [3, 7, 8]
    assert torch.equal(ids[batch.rows, predictors + 1], batch.targets[batch.sources])


def test_a_target_of_a_shared_node_counts_in_every_row_that_goes_through_it():
    """Targets 7 and 8 at depth 1 and, in the second tree, 4 at depth 2 are computed once and stand in both rows."""
    batch = pack_tree(TREE)
    assert batch.scatter(batch.targets).tolist() == [[9, 0, 0, 0, 0, 0], [7, 8, 0, 0, 12, 0], [7, 8, 0, 0, 13, 0]]
    deeper = [([1], [True], -1), ([2, 3], [True, False], 0), ([4], [True], 1), ([5], [True], 2), ([6], [True], 2)]
    batch = pack_tree(deeper, numbers=[8, 8])
    assert batch.scatter(batch.targets).tolist() == [[2, 0, 4, 5], [2, 0, 4, 6]] and len(batch.targets) == 4
    assert batch.to_padded([[0.5, 0.25, 1.0, 2.0]] * 2).tolist() == [[0.5, 0.0, 1.0, 2.0]] * 2
    assert batch.numbers == (8,)


def test_a_row_may_end_inside_a_tree():
    batch = pack_tree(TREE, ends=[1, 4])
    assert batch.scatter(batch.targets).tolist() == [[7, 8, 0, 0, 0], [7, 8, 0, 0, 12]]


def test_a_tree_of_depth_one_is_a_group():
    group = pack_groups([([5, 6], [[8, 9, 3], [4]]), ([7], [[1, 2]])])
    parents = [([5, 6], -1), ([8, 9, 3], 0), ([4], 0), ([7], -1), ([1, 2], 3)]
    tree = pack_tree([(ids, [True] * len(ids), parent) for ids, parent in parents])
    assert group.segments == tree.segments and group.row_segments == tree.row_segments
    for name in ("input_ids", "position_ids", "predictors", "targets", "sources", "rows", "columns", "mask"):
        assert torch.equal(getattr(group, name), getattr(tree, name)), name


def test_nothing_to_do_is_one_token_without_targets():
    for batch in (empty_batch(), pack_groups([]), pack_examples([]), pack_tree([])):
        assert batch.num_tokens == 1 and batch.mask.shape == (0, 0) and not len(batch.targets)


def test_a_token_budget_is_kept_and_a_longer_row_stands_alone():
    """Lengths 3 4 9 2 2 2 with a budget of 7: [3 4] [9] [2 2 2]."""
    cuts = cut_microbatches([3, 4, 9, 2, 2, 2], max_rows=99, max_tokens=7)
    assert [list(c) for c in cuts] == [[0, 1], [2], [3, 4, 5]]
    assert [list(c) for c in cut_microbatches([1] * 5, max_rows=2)] == [[0, 1], [2, 3], [4]]


def test_a_token_budget_counts_a_shared_prompt_once_a_batch():
    """Prompts of 4 with two completions of 3 each: 4+3+3 = 10, so a budget of 10 holds a group, and 9 cuts it."""
    a, b = [1] * 4, [2] * 4
    for budget, expected in ((10, [[0, 1], [2, 3]]), (9, [[0], [1], [2], [3]]), (20, [[0, 1, 2, 3]])):
        cuts = cut_microbatches([3] * 4, max_rows=99, max_tokens=budget, prompts=[a, a, b, b])
        assert [list(c) for c in cuts] == expected


def test_best_fit_fills_the_fullest_bin_that_has_room():
    """9 | 6 | 5 go to bins of 10; 4 fits beside 6 (room 4) and 5 (room 5): the fuller one; then 5 takes 3 and 2."""
    assert best_fit([4, 9, 6, 5, 3, 2, 12], 10) == [[6], [1], [2, 0], [3, 4, 5]]


def test_every_row_is_seen_once_an_epoch_and_the_order_changes():
    epochs = [
        [r for s in range(e * 4, e * 4 + 4) for r in rows_of_step(s, num_rows=10, rows_per_step=3, seed=1)]
        for e in (0, 1)
    ]
    assert steps_per_epoch(10, 3) == 4
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10)) and epochs[0] != epochs[1]
    assert rows_of_step(0, num_rows=2, rows_per_step=8, seed=0) in ([0, 1], [1, 0])  # fewer rows than a step


@pytest.mark.parametrize("num_processes", [1, 2, 3, 5])
def test_processes_share_a_step_without_loss_and_in_step(num_processes):
    lengths = [5, 90, 4, 4, 60, 30, 7]
    shares = [share_of_rank(lengths, rank=r, num_processes=num_processes) for r in range(num_processes)]
    assert sorted(sum(shares, [])) == list(range(7))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    cuts = [cut_step(lengths, rank=r, num_processes=num_processes, max_rows=2) for r in range(num_processes)]
    assert len({len(c) for c in cuts}) == 1  # as many forwards on every process
    assert sorted(i for c in cuts for micro in c for i in micro) == list(range(7))


def test_rows_per_step_counts_processes():
    config = BatchConfig(per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert config.rows_per_step(3) == 24
    assert BatchConfig(train_batch_size=10).rows_per_step(3) == 10
    with pytest.raises(ValueError, match="per_device_train_batch_size"):
        BatchConfig(per_device_train_batch_size=0)


def examples_of(lengths):
    return [Example([7] * length, [True] * length, number=row) for row, length in enumerate(lengths)]


def drawn_lengths(count, low=1, high=100):
    draw = random.Random(count)
    return [draw.randint(low, high) for _ in range(count)]


@pytest.mark.parametrize(("count", "high", "size"), [(1, 9, 8), (300, 100, 64), (300, 20, 64), (500, 64, 1000)])
@pytest.mark.parametrize("decreasing", [True, False])
def test_best_fit_is_what_its_definition_says(count, high, size, decreasing):
    """Bin by bin the same as the search through all of them that the definition asks for."""
    lengths = drawn_lengths(count, high=high)
    bins, used = [], []
    for row in sorted(range(count), key=lambda i: (-lengths[i], i)) if decreasing else range(count):
        open_ = [number for number in range(len(bins)) if used[number] + lengths[row] <= size]
        number = max(open_, key=lambda n: (used[n], -n), default=len(bins))
        if number == len(bins):
            bins.append([])
            used.append(0)
        bins[number].append(row)
        used[number] += lengths[row]
    assert best_fit(lengths, size, None if decreasing else range(count)) == bins


@pytest.mark.parametrize("kind", ["short", "long and short"])
def test_a_million_rows_are_packed_in_seconds(kind, monkeypatch):
    """For each row, one list is searched that has an entry a length at most, not one a bin (10 and 97 s for 2 and 4).

    Rows of 30 to 600 tokens; and half a million of more than half a bin, each of which waits for a short one."""
    if kind == "short":
        rows = drawn_lengths(1_000_000, 30, 600)
    else:
        rows = drawn_lengths(500_000, 1025, 1500) + drawn_lengths(500_000, 100, 500)
    sizes, insort = {0}, bisect.insort
    monkeypatch.setattr(bisect, "insort", lambda entries, new: (insort(entries, new), sizes.add(len(entries))))
    bins = best_fit(rows, 2048)
    assert 0 < max(sizes) <= 2048
    assert sum(rows) / (2048 * len(bins)) > 0.999 if kind == "short" else len(bins) == 500_000


@IN_BINS
def test_bins_hold_every_row_once_and_no_more_than_the_budget(strategy):
    lengths = drawn_lengths(400)
    config = BatchConfig(packing_strategy=strategy, max_tokens_per_batch=64)
    bins, text = build_bins(examples_of(lengths), config, seed=1)
    assert sorted(e.number for rows in bins for e in rows) == list(range(400))
    sums = [sum(len(e.input_ids) for e in rows) for rows in bins]
    assert all(total <= 64 or len(rows) == 1 for total, rows in zip(sums, bins, strict=True))
    alone = [rows[0].number for rows in bins if len(rows[0].input_ids) > 64]
    assert sorted(alone) == [row for row, length in enumerate(lengths) if length > 64] and alone
    percent = 100 * sum(min(total, 64) for total in sums) / (64 * len(bins))
    assert text == f"{strategy}, 400 rows in {len(bins)} bins of 64 tokens, {percent:.1f} % full"
    assert build_bins(examples_of(lengths), config, seed=1) == (bins, text)
    assert (build_bins(examples_of(lengths), config, seed=2)[0] == bins) == (strategy == "bfd")
    assert build_bins(examples_of([3, 4]), BatchConfig(), seed=1) == ([[e] for e in examples_of([3, 4])], "step")


def test_best_fit_mixes_lengths_where_longest_first_does_not():
    """300 rows of 40 tokens and 300 of 10, in bins of 400: longest first makes bins of one kind."""
    short = {}
    for strategy in ("best_fit", "bfd"):
        config = BatchConfig(packing_strategy=strategy, max_tokens_per_batch=400)
        bins, _ = build_bins(examples_of([40] * 300 + [10] * 300), config, seed=0)
        short[strategy] = [sum(len(e.input_ids) == 10 for e in rows) / len(rows) for rows in bins]
    assert set(short["bfd"]) <= {0.0, 1.0}
    assert sorted(short["best_fit"])[len(short["best_fit"]) // 4] > 0.3


@IN_BINS
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_an_epoch_draws_every_bin_once_and_no_process_cuts_or_joins_them(processes, strategy):
    """Micro-batches are bins, as many on every process; the last step takes what is left, with empty ones."""
    config = BatchConfig(packing_strategy=strategy, max_tokens_per_batch=64, gradient_accumulation_steps=2)
    bins, _ = build_bins(examples_of(drawn_lengths(197, high=80)), config, seed=1)
    per_step = config.rows_per_step(processes)
    steps = steps_per_epoch(len(bins), per_step)
    assert per_step == 2 * processes and len(bins) % per_step % 2  # a shorter last step, of an odd number
    epochs = []
    for epoch in (0, 1):
        seen = []
        for step in range(epoch * steps, (epoch + 1) * steps):
            rows = rows_of_step(step, num_rows=len(bins), rows_per_step=per_step, seed=5)
            totals = [sum(len(e.input_ids) for e in bins[row]) for row in rows]
            cuts = [
                cut_step(totals, rank=r, num_processes=processes, max_rows=8, max_tokens=64) for r in range(processes)
            ]
            assert {len(cut) for cut in cuts} == {-(-len(rows) // processes)}
            assert all(len(micro) <= 1 for cut in cuts for micro in cut)
            assert sorted(place for cut in cuts for micro in cut for place in micro) == list(range(len(rows)))
            seen += rows
        assert sorted(seen) == list(range(len(bins)))
        epochs.append(seen)
    assert epochs[0] != epochs[1]


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")
@pytest.mark.parametrize("size", [1024, 2048, 4096])
def test_real_rows_fill_their_bins(size):
    """1,000 rows of GSM8K: 97 % full and more, and fewer bins than taking rows as they come needs, in any order."""
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers/smollm2-135m-instruct")
    rows = [json.loads(line) for line in (SHARED / "data/gsm8k_train.jsonl").read_text().splitlines()]
    lengths = [len(ids) for ids in tokenizer([f"{row['question']}\n{row['answer']}" for row in rows])["input_ids"]]
    next_fit = cut_microbatches(lengths, max_rows=len(lengths), max_tokens=size)
    for bins in (best_fit(lengths, size), best_fit(lengths, size, range(len(lengths)))):
        assert max(lengths) <= size and len(bins) < len(next_fit)
        assert sum(lengths) > 0.97 * size * len(bins)


def test_bins_are_counted_and_shared_equally():
    config = BatchConfig(**BFD, per_device_train_batch_size=32, gradient_accumulation_steps=3)
    assert config.rows_per_step(2) == 6
    config = BatchConfig(**BFD, train_batch_size=6)
    assert config.rows_per_step(3) == 6
    with pytest.raises(ValueError, match="train_batch_size is 6 and counts bins .* multiple of the 4 processes"):
        config.rows_per_step(4)
    assert BatchConfig(train_batch_size=6).rows_per_step(4) == 6


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"packing_strategy": "wrapped"}, "packing_strategy is 'wrapped'; give step, best_fit or bfd"),
        ({"packing_strategy": "bfd"}, "packing_strategy: bfd .* max_tokens_per_batch above 0"),
        ({**BFD, "packing": False}, "packing_strategy: bfd .* packing: true"),
    ],
)
def test_a_packing_strategy_that_cannot_work_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        BatchConfig(**settings)
