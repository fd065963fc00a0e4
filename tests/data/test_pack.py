"""Packing: every token once, the shift once, rows and counts that never depend on how they are cut."""

import pytest
import torch

from data.chat import Example, Pair
from data.pack import (
    BatchConfig,
    best_fit,
    cut_microbatches,
    cut_step,
    empty_batch,
    pack_examples,
    pack_groups,
    pack_pairs,
    rows_of_step,
    share_of_rank,
    steps_per_epoch,
)  # fmt: skip


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
    batch = pack_groups([([5], [[8], [9]])], trained=[False, True])
    assert batch.mask.tolist() == [[False], [True]] and batch.targets.tolist() == [9]


def test_nothing_to_do_is_one_token_without_targets():
    for batch in (empty_batch(), pack_groups([]), pack_examples([])):
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
