"""A pair's loss is that of its two whole completions, however they are computed."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoTokenizer

from data.batches import BatchConfig
from data.chat import EncodeConfig, Pair, encode_pair, encode_prompt
from data.pack import pack_pairs
from loops import dpo
from loops.shared.models import ModelConfig
from loops.shared.policy import score
from loops.shared.reference import Reference, build_reference
from loops.shared.run import RunConfig
from losses.dpo import LOSS_TYPES, dpo_loss
from tests.loops.test_steps import tiny_policy

FLAGS = [False, True, True, False, True]
PAIRS = {
    "nothing shared": Pair([5, 6, 7], [8, 9, 2], [10, 2]),
    "shared up to the last tokens": Pair([5, 6], [7, 8, 9, 10, 11, 2], [7, 8, 9, 12]),
    "one is the beginning of the other": Pair([5], [7, 8], [7, 8, 9, 2]),
    "users' words inside": Pair([5, 6], [7, 8, 9, 10, 2], [7, 8, 9, 10, 11], 0, FLAGS, FLAGS),
    "flags part before the tokens": Pair([5], [7, 8, 9], [7, 8, 10], 0, [True, True, True], [True, False, True]),
}


def plain_logps(model, pair):
    """Of (chosen, rejected): log-probability and number of scored tokens, one sequence at a time."""
    sums, counts = [], []
    for ids, is_target in pair.completions():
        row = torch.tensor([pair.prompt_ids + ids])
        logprobs = model(input_ids=row).logits.log_softmax(-1)[0]
        wanted = [t for t, wanted in enumerate(is_target, len(pair.prompt_ids)) if wanted]
        sums.append(sum(logprobs[t - 1, row[0, t]] for t in wanted))
        counts.append(len(wanted))
    return sums, counts


def textbook_loss(loss_type, policy, reference, counts, beta):
    c, r = policy[0] - reference[0], policy[1] - reference[1]
    if loss_type in ("ipo", "sigmoid_norm"):
        c, r = c / counts[0], r / counts[1]
    s = torch.sigmoid
    return {
        "sigmoid": -s(beta * (c - r)).log(),
        "sigmoid_norm": -s(beta * (c - r)).log(),
        "robust": -s(beta * (c - r)).log(),
        "hinge": (1 - beta * (c - r)).clamp(min=0),
        "ipo": (c - r - 1 / (2 * beta)) ** 2,
        "apo_zero": 1 - s(beta * c) + s(beta * r),
        "apo_down": s(beta * c) + 1 - s(beta * (c - r)),
    }[loss_type]


def moved_policy(packing):
    """(policy, its reference): all weights times 1.1 and as they were."""
    policy = tiny_policy(packing=packing)
    reference = build_reference(policy)
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(1.1)
    return policy, reference


def loss_of(policy, ref_logps, batch, config):
    """As the loop computes it."""
    logps = score(policy, batch).logprobs.sum(dim=1)
    lengths = batch.mask.sum(dim=1)
    return dpo_loss(
        *(logps[0::2], logps[1::2], ref_logps[0::2], ref_logps[1::2]),
        beta=config.beta,
        loss_type=config.loss_type,
        chosen_lengths=lengths[0::2],
        rejected_lengths=lengths[1::2],
    )


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "plain"])
def test_loss_and_gradient_are_those_of_whole_completions(loss_type, packing, only_float64):
    """Float64, 1e-12, all pairs in one batch and each alone; the reference is a model or a table."""
    beta = 0.5
    config = dpo.Config(loss_type=loss_type, beta=beta)
    policy, reference = moved_policy(packing)
    for chosen in [*([pair] for pair in PAIRS.values()), list(PAIRS.values())]:
        policy.zero_grad()
        batch = pack_pairs(chosen)
        ref_logps = reference.sequence_logprobs(batch, range(len(chosen)))
        loss, terms = loss_of(policy, ref_logps, batch, config)
        loss.backward()
        got = {name: p.grad.clone() for name, p in policy.named_parameters()}
        policy.zero_grad()
        expected, logps = 0.0, []
        for pair in chosen:
            (own, counts), (before, _) = plain_logps(policy, pair), plain_logps(reference.model, pair)
            expected = expected + textbook_loss(loss_type, own, [b.detach() for b in before], counts, beta)
            logps.append((own, counts))
        expected.backward()
        assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
        assert max((got[n] - p.grad).abs().max().item() for n, p in policy.named_parameters()) < 1e-12
        assert float(terms["policy/chosen_logps"]) == pytest.approx(sum(float(own[0]) for own, _ in logps))
        assert float(terms["policy/rejected_logps"]) == pytest.approx(sum(float(own[1]) for own, _ in logps))
        assert len(batch.rows) == sum(sum(counts) for _, counts in logps)  # a shared beginning counts in both
        assert batch.num_tokens == sum(pair.num_tokens for pair in chosen)
        table = Reference(None, "copy")  # whose model is gone
        table.tables["train"] = ref_logps.double().view(-1, 2).flip(0)
        backwards = list(reversed(range(len(chosen))))
        again, _ = loss_of(policy, table.sequence_logprobs(batch, backwards), batch, config)
        assert float(again) == pytest.approx(loss.item(), abs=1e-12)


def test_completions_that_differ_in_the_last_digit_are_whole():
    """The same working twice: 29 scored tokens each, 26 of them computed once, after the prompt that sampling sees."""
    tokenizer = AutoTokenizer.from_pretrained("data/quickstart/model")
    working = "<think>4+1=5 7+9=16 6+1+1=8</think>\n<answer>86{}</answer>"
    row = {"prompt": [{"role": "user", "content": "674 + 191 = ?"}]}
    row |= {"chosen": working.format(5), "rejected": working.format(4)}
    pair = encode_pair(row, tokenizer, EncodeConfig())
    assert (len(pair.chosen_ids), len(pair.rejected_ids), pair.num_shared) == (29, 29, 26)
    assert pair.prompt_ids == encode_prompt(row, tokenizer, EncodeConfig()).prompt_ids
    assert pack_pairs([pair]).mask.sum(dim=1).tolist() == [29, 29]


def test_what_both_completions_begin_with_is_computed_once():
    """Prompt 5 6, completions 7 8 9 and 7 8 4: 2 + 2 + 1 + 1 tokens, four targets, six places."""
    batch = pack_pairs([Pair([5, 6], [7, 8, 9], [7, 8, 4])])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 4]] and batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 4]]
    assert batch.targets.tolist() == [7, 8, 9, 4] and batch.predictors.tolist() == [1, 2, 3, 3]
    assert batch.mask.tolist() == [[True] * 3] * 2
    assert batch.scatter(batch.targets).tolist() == [[7, 8, 9], [7, 8, 4]]
    assert batch.to_padded([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]).tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    ids, attention, predictors = batch.padded()
    assert ids.tolist() == [[5, 6, 7, 8, 9], [5, 6, 7, 8, 4]] and predictors.tolist() == [1, 2, 3] * 2
    assert torch.equal(ids[batch.rows, predictors + 1], batch.targets[batch.sources])


def test_reference_scores_are_known_by_what_decides_them():
    """Not by what costs time or memory, or belongs to the loss; the tokens, the base and its precision do decide."""
    accelerator = Accelerator(cpu=True)
    pairs, base = list(PAIRS.values()), {"model_id": "base", "lora_r": 8}

    def mark(pairs=pairs, batch=None, loss=None, seed=0, **model):
        config = dpo.Config(
            model=ModelConfig(**{**base, **model}),
            batch=BatchConfig(**batch or {}),
            run=RunConfig(seed=seed),
            **loss or {},
        )
        return Reference.fingerprint(pairs, config.model, config.run.seed, accelerator)

    free = [{key: True} for key in ("gradient_checkpointing", "activation_offloading", "merge_weights", "use_dora")]
    free += [{"compile": True}, {"attn_implementation": "eager"}, {"lora_r": 4}, {"lora_dropout": 0.1}, {"seed": 1}]
    free += [{"batch": {"packing": False}}, {"batch": {"max_tokens_per_batch": 99}}, {"bnb_4bit_quant_type": "fp4"}]
    free += [{"loss": {"loss_type": "ipo", "beta": 0.5}}, {"pairs": [replace(pair, number=7) for pair in pairs]}]
    free += [{"torch_dtype": "float32"}]  # what auto means on a CPU
    assert {mark(**settings) for settings in free} == {mark()}
    first, *others = pairs
    decides = [{"model_id": "other"}, {"revision": "v2"}, {"from_scratch": True}, {"torch_dtype": "bfloat16"}]
    decides += [{"from_scratch": True, "seed": 1}, {"load_in_4bit": True}, {"load_in_8bit": True}]
    decides += [{"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, {"pairs": others}, {"pairs": [*others, first]}]
    decides += [{"pairs": [replace(first, rejected_ids=[11, 2]), *others]}]
    decides += [{"pairs": [replace(first, chosen_is_target=[True, False, True]), *others]}]
    marks = [mark(**settings) for settings in decides]
    assert len({mark(), *marks}) == len(decides) + 1
