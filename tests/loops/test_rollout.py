"""Laws of the rollouts: what the embedded engine samples is what the policy says, whatever the batch."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen3Config,
)

from loops.grpo import Config as GrpoConfig
from loops.shared.rollout import Completion, RolloutConfig, Sampling, build_engine
from loops.shared.rollout.mismatch import explain_mismatch
from loops.shared.rollout.sampling import (
    bad_word_table,
    bad_word_tokens,
    banned_tokens,
    choose_tokens,
    noise_keys,
    uniform_noise,
)
from loops.shared.rollout.transformers_engine import TransformersEngine

VOCABULARY = 96
WIDTHS = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=3)
GROUPED = dict(num_key_value_heads=2, head_dim=8, bos_token_id=None, eos_token_id=None, pad_token_id=None)
CONFIGS = {
    "qwen3": Qwen3Config(**WIDTHS, **GROUPED),
    "qwen3-mixed-window": Qwen3Config(
        **WIDTHS, **GROUPED, use_sliding_window=True, sliding_window=6, max_window_layers=1, tie_word_embeddings=True
    ),
    "llama": LlamaConfig(**WIDTHS, **GROUPED),
    "gpt-neox": GPTNeoXConfig(**WIDTHS, bos_token_id=None, eos_token_id=None),
    "mistral-window": MistralConfig(**WIDTHS, **GROUPED, sliding_window=6),
    "lfm2-convolution": Lfm2Config(
        **WIDTHS, num_key_value_heads=2, layer_types=["conv", "full_attention", "conv"], block_multiple_of=16,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    ),
}  # fmt: skip
PROMPTS = [[5, 9, 13, 2, 44, 17, 80, 3, 21], [7], [60, 61, 62, 63], [7], [30, 31, 32, 33, 34]]
NUMBERS = [10, 11, 12, 13, 14]


def build_model(name: str = "qwen3", std: float = 0.3) -> PreTrainedModel:
    """A random model, spread enough that its greedy choices are clear and its distributions uneven."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="sdpa")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, std)
    return model.eval()


class LetterTokenizer:
    """Token i is a letter of the alphabet, 26 to 51 those that are written at the start of a text after a space; 95 is
    a special token, which shows nothing."""

    eos_token_id = None

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        letters = [ord(letter) - 97 for letter in text.strip()]
        return [letters[0] + 26, *letters[1:]] if text.startswith(" ") else letters

    def batch_decode(
        self, sequences: list[list[int]], skip_special_tokens: bool, clean_up_tokenization_spaces: bool
    ) -> list[str]:
        assert skip_special_tokens and not clean_up_tokenization_spaces
        return ["".join(chr(97 + token % 26) for token in sequence if token != 95) for sequence in sequences]


class ForwardLog:
    """Shapes [rows, columns] of all tokens that go through a model."""

    def __init__(self, model: torch.nn.Module):
        self.shapes: list[tuple[int, ...]] = []
        model.register_forward_pre_hook(
            lambda module, args, kwargs: self.shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
        )

    def tokens(self) -> int:
        return sum(rows * columns for rows, columns in self.shapes)


def sample(
    model: torch.nn.Module,
    prompts: list[list[int]] = PROMPTS,
    *,
    n: int = 1,
    seed: int = 0,
    numbers: list[int] | None = None,
    tokenizer: LetterTokenizer | None = None,
    max_decode_batch: int = 0,
    prefill_token_budget: int = 16384,
    check_every: int = 0,
    **sampling: object,
) -> list[list[Completion]]:
    engine = TransformersEngine(
        model,
        tokenizer,
        max_decode_batch=max_decode_batch,
        prefill_token_budget=prefill_token_budget,
        check_every=check_every,
    )
    numbers = NUMBERS[: len(prompts)] if numbers is None else numbers
    return engine.sample(prompts, n=n, sampling=Sampling(**sampling), seed=seed, prompt_numbers=numbers)


def tokens_of(groups: list[list[Completion]]) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in group] for group in groups]


def scored(model: PreTrainedModel, prompt: list[int], completion: list[int], temperature: float = 1.0) -> torch.Tensor:
    """log-probabilities [T] of the completion by one plain forward over prompt and completion."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0].float() / temperature
    rows = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return rows.gather(-1, torch.tensor(completion)[:, None])[:, 0]


# ---- greedy and log-probabilities ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_equals_generate_on_each_prompt_alone(name: str) -> None:
    """Prompts of 9, 1, 4, 1 and 5 tokens in one left-padded batch; windows of 6 tokens are passed by 12 new ones."""
    model = build_model(name)
    groups = sample(model, temperature=0.0, max_completion_length=12)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        expected = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12, pad_token_id=0)
        assert group[0].token_ids == expected[0, len(prompt) :].tolist()


def test_greedy_equals_generate_on_the_left_padded_batch() -> None:
    model = build_model()
    width = max(map(len, PROMPTS))
    padded = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    expected = model.generate(padded, attention_mask=mask, do_sample=False, max_new_tokens=20, pad_token_id=0)
    groups = sample(model, temperature=0.0, max_completion_length=20)
    assert [group[0].token_ids for group in groups] == expected[:, width:].tolist()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_logprobs_equal_a_plain_forward(name: str, temperature: float) -> None:
    """log softmax(logits / temperature), at temperature 1 for greedy tokens."""
    model = build_model(name, std=0.2)
    groups = sample(model, n=3, temperature=temperature, max_completion_length=11)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for completion in group:
            expected = scored(model, prompt, completion.token_ids, temperature or 1.0)
            assert torch.allclose(torch.tensor(completion.logprobs), expected, atol=1e-5, rtol=0)


def test_logprobs_ignore_truncation() -> None:
    """With top_k=1 every token has probability 1 after truncation; what comes back is the untruncated one."""
    model = build_model()
    completion = sample(model, top_k=1, temperature=0.8, max_completion_length=6)[0][0]
    assert torch.allclose(
        torch.tensor(completion.logprobs), scored(model, PROMPTS[0], completion.token_ids, 0.8), atol=1e-5
    )
    assert min(completion.logprobs) < -0.01


def test_float64_model_gives_float64_logprobs() -> None:
    model = build_model().double()
    completion = sample(model, max_completion_length=6)[0][0]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([PROMPTS[0] + completion.token_ids])).logits[0]
    expected = logits.log_softmax(-1)[len(PROMPTS[0]) - 1 : -1]
    expected = expected.gather(-1, torch.tensor(completion.token_ids)[:, None])[:, 0]
    assert torch.allclose(torch.tensor(completion.logprobs, dtype=torch.float64), expected, atol=1e-12, rtol=0)


# ---- chance ----------------------------------------------------------------------------------------------------------


def test_sampled_distribution_is_the_softmax() -> None:
    """20,000 first tokens: Pearson's chi-square over C cells has mean C - 1 and variance 2 (C - 1); 4 deviations."""
    model = build_model(std=0.15)
    draws = 20_000
    groups = sample(model, [PROMPTS[0]], n=draws, temperature=0.9, max_completion_length=1)
    counts = torch.bincount(torch.tensor([c.token_ids[0] for c in groups[0]]), minlength=VOCABULARY).double()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].double()
    expected = draws * (logits / 0.9).softmax(-1)
    common = expected >= 5
    cells = torch.cat([expected[common], expected[~common].sum()[None]])
    seen = torch.cat([counts[common], counts[~common].sum()[None]])
    cells, seen = cells[cells > 0], seen[cells > 0]
    statistic = ((seen - cells) ** 2 / cells).sum()
    freedom = len(cells) - 1
    assert freedom > 20
    assert abs(statistic - freedom) < 4 * (2 * freedom) ** 0.5


def test_large_vocabulary_is_drawn_by_its_weights() -> None:
    """1,000 tokens (three whole blocks and a rest) with weights 0, 1, 2, 3 by turns: equidistant noise must give each
    token its share within one draw, and none of weight 0."""
    weights = torch.arange(1000) % 4
    draws = 60_000
    noise = (torch.arange(draws).double() + 0.5) / draws
    logits = weights.log().expand(draws, -1)
    tokens, logprobs = choose_tokens(logits, noise, Sampling())
    counts = torch.bincount(tokens, minlength=1000)
    assert (counts - draws * weights / weights.sum()).abs().max() <= 1
    assert torch.allclose(logprobs, (weights / weights.sum()).log()[tokens], atol=1e-5)


@pytest.mark.parametrize("truncation", [{}, {"top_k": 7}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_ends_of_the_noise_never_draw_a_token_of_probability_zero(truncation: dict[str, float]) -> None:
    """Probability only at tokens 3 and 300 of 600: the smallest and the largest noise draw those."""
    logits = torch.full((2, 600), -torch.inf)
    logits[:, 3], logits[:, 300] = 1.0, 0.5
    noise = torch.tensor([2.0**-49, 1 - 2.0**-49], dtype=torch.float64)
    tokens, logprobs = choose_tokens(logits, noise, Sampling(**truncation))
    assert tokens.tolist() == [3, 300]
    assert logprobs.isfinite().all()


def test_noise_is_splitmix64() -> None:
    """Position j of a key is the mixer at key + (j + 1) * golden ratio, modulo 2**64: the top 48 bits, and a half."""

    def mix(state: int) -> int:
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        return state ^ (state >> 31)

    golden = 0x9E3779B97F4A7C15
    assert mix(golden) == 0xE220A8397B1DCDAF  # the published first output of splitmix64 with seed 0
    for seed, prompt, completion in [(0, 0, 0), (-1, 5, 2), (2**63 + 11, 10**12, 7)]:
        key = seed % 2**64
        for number in (prompt, completion):
            key = mix(mix((key + golden) % 2**64) ^ number)
        noise = uniform_noise(noise_keys(seed, torch.tensor([prompt]), torch.tensor([completion])), 3, 4)
        expected = [((mix((key + (j + 1) * golden) % 2**64) >> 16) + 0.5) / 2**48 for j in range(3, 7)]
        assert noise[0].tolist() == expected


def test_noise_is_uniform_and_independent() -> None:
    """100 x 10 keys of 40 positions: mean 1/2 and variance 1/12 within 5 deviations, neighbours uncorrelated."""
    prompts, completions = torch.meshgrid(torch.arange(100), torch.arange(10), indexing="ij")
    noise = uniform_noise(noise_keys(1, prompts.flatten(), completions.flatten()), 0, 40)
    assert noise.unique().numel() == noise.numel()
    assert abs(noise.mean() - 0.5) < 5 * (1 / 12 / noise.numel()) ** 0.5
    assert abs(noise.var() - 1 / 12) < 5 * (1 / 180 / noise.numel()) ** 0.5
    for one, other in [(noise[:, 1:], noise[:, :-1]), (noise[1:], noise[:-1]), (noise[10:], noise[:-10])]:
        correlation = torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]
        assert abs(correlation) < 5 / one.numel() ** 0.5


def test_completion_does_not_depend_on_its_batch() -> None:
    """The same (seed, prompt number, completion) among other prompts, in another order, cut into other batches."""
    model = build_model()
    together = tokens_of(sample(model, n=4, seed=3, max_completion_length=15))
    for place, (prompt, number) in enumerate(zip(PROMPTS, NUMBERS, strict=True)):
        alone = sample(model, [prompt], n=4, seed=3, numbers=[number], max_completion_length=15)
        assert tokens_of(alone)[0] == together[place]
        assert [tokens_of(alone)[0][0]] == tokens_of(
            sample(model, [prompt], seed=3, numbers=[number], max_completion_length=15)
        )[0]
    backwards = sample(model, PROMPTS[::-1], n=4, seed=3, numbers=NUMBERS[::-1], max_completion_length=15)
    assert tokens_of(backwards)[::-1] == together
    for max_decode_batch, budget in itertools.product([1, 3, 7], [1, 10]):
        cut = sample(
            model, n=4, seed=3, max_completion_length=15, max_decode_batch=max_decode_batch, prefill_token_budget=budget
        )
        assert tokens_of(cut) == together


def test_completion_does_not_depend_on_its_batch_with_recurrent_layers() -> None:
    model = build_model("lfm2-convolution")
    together = tokens_of(sample(model, n=4, max_completion_length=8))
    assert tokens_of(sample(model, n=4, max_completion_length=8, max_decode_batch=3)) == together


def test_seed_prompt_number_and_completion_change_the_noise() -> None:
    """Prompts 1 and 3 hold the same tokens under other numbers: their 8 completions under each of 2 seeds differ."""
    model = build_model(std=0.1)
    first, second = (sample(model, n=4, seed=seed, max_completion_length=12) for seed in (0, 1))
    lists = [c.token_ids for groups in (first, second) for place in (1, 3) for c in groups[place]]
    assert len({tuple(tokens) for tokens in lists}) == 16


def test_noise_goes_on_past_its_first_block() -> None:
    """Noise and room for keys are made 128 tokens at a time: 300 tokens, and the log-probabilities still hold."""
    model = build_model(std=0.1)
    completion = sample(model, [PROMPTS[0]], max_completion_length=300)[0][0]
    assert len(completion.token_ids) == 300
    assert completion.token_ids[:128] != completion.token_ids[128:256]
    expected = scored(model, PROMPTS[0], completion.token_ids)
    assert torch.allclose(torch.tensor(completion.logprobs), expected, atol=1e-5, rtol=0)


# ---- truncation ------------------------------------------------------------------------------------------------------


def test_top_k_of_one_is_greedy() -> None:
    model = build_model()
    greedy = sample(model, temperature=0.0, max_completion_length=10)
    assert tokens_of(sample(model, top_k=1, max_completion_length=10)) == tokens_of(greedy)


@pytest.mark.parametrize(
    ("truncation", "allowed"),
    [
        ({"top_k": 2}, {1, 2}),
        ({"top_p": 0.6}, {1, 2}),
        ({"top_p": 0.4}, {1}),
        ({"top_p": 0.8}, {0, 1, 2}),
        ({"min_p": 0.3}, {0, 1, 2}),
        ({"min_p": 0.4}, {1, 2}),
        ({"top_k": 3, "top_p": 0.8}, {1, 2}),
        ({"top_k": 3, "min_p": 0.4}, {1, 2}),
        ({}, {0, 1, 2, 3}),
    ],
)
def test_truncation_keeps_only_the_allowed_tokens(truncation: dict[str, float], allowed: set[int]) -> None:
    """Probabilities .16, .5, .25, .09. Top-p .6 needs .5 + .25, top-p .8 needs .16 more; min-p .3 asks for .15, min-p
    .4 for .2; of the best three, .91 in mass, top-p .8 asks for .728, which .5 + .25 holds. What stays keeps its
    proportions."""
    probabilities = torch.tensor([0.16, 0.5, 0.25, 0.09])
    draws = 4000
    noise = (torch.arange(draws).double() + 0.5) / draws
    tokens, _ = choose_tokens(probabilities.log().expand(draws, -1), noise, Sampling(**truncation))
    assert set(tokens.tolist()) == allowed
    kept = torch.tensor([token in allowed for token in range(4)]) * probabilities
    counts = torch.bincount(tokens, minlength=4)
    assert (counts - draws * kept / kept.sum()).abs().max() <= 1


def test_nucleus_wider_than_the_first_sort_is_whole() -> None:
    """3,000 equal tokens, top_p = 0.5: exactly 1,500 of them stay, more than the 1,024 sorted at first."""
    draws = 6000
    noise = (torch.arange(draws).double() + 0.5) / draws
    tokens, _ = choose_tokens(torch.zeros(draws, 3000), noise, Sampling(top_p=0.5))
    assert abs(tokens.unique().numel() - 1500) <= 1


# ---- bad words -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("check_every", [1, 8])
def test_bad_words_are_taken_out_of_each_distribution_and_nothing_else_is(temperature: float, check_every: int) -> None:
    """Each token is the one that its noise (or the maximum) picks from the policy's distribution without the tokens
    that complete a bad word. The words are what free completions hold: a letter, pairs, triples, and pairs whose first
    token is the prompt's last, which stay allowed there."""
    model = build_model(std=0.1)
    tokenizer = LetterTokenizer()
    free = sample(model, n=8, temperature=temperature, max_completion_length=16)
    lists = [completion.token_ids for group in free for completion in group]
    lists += [[prompt[-1], c.token_ids[0]] for prompt, group in zip(PROMPTS, free, strict=True) for c in group]
    spans = [tokens[t : t + size] for tokens in lists for size in (2, 3) for t in range(len(tokens) - size + 1)]
    spans = [span for span in spans if span[0] < 52 and max(span[1:]) < 26]
    spans += [[16]]
    words = tuple(dict.fromkeys(tokenizer.batch_decode(spans, True, False)))
    bad = [[ord(letter) - 97 for letter in word] for word in words]
    bad += [[first + 26, *rest] for first, *rest in bad]
    groups = sample(
        model,
        n=8,
        tokenizer=tokenizer,
        temperature=temperature,
        max_completion_length=16,
        bad_words=words,
        check_every=check_every,
    )
    taken = 0
    for prompt, group, number in zip(PROMPTS, groups, NUMBERS, strict=True):
        for place, completion in enumerate(group):
            tokens = completion.token_ids
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].double()
            noise = uniform_noise(noise_keys(0, torch.tensor([number]), torch.tensor([place])), 0, 16)[0]
            for t, (token, row) in enumerate(zip(tokens, logits, strict=True)):
                left = (row / (temperature or 1.0)).softmax(-1)
                for *prefix, last in bad:
                    if t >= len(prefix) and tokens[t - len(prefix) : t] == prefix:
                        taken += len(prefix) > 0
                        left[last] = 0.0
                sums = left.cumsum(0)
                chosen = torch.searchsorted(sums, noise[t] * sums[-1], right=True) if temperature else left.argmax()
                assert token == chosen
            expected = scored(model, prompt, tokens, temperature or 1.0)
            assert torch.allclose(torch.tensor(completion.logprobs), expected, atol=1e-5, rtol=0)
    assert taken > 50 and tokens_of(groups) != tokens_of(free)


def test_what_would_complete_a_bad_word_is_banned() -> None:
    """Words 5; 3 4; 3 3 6; and one whose last token the model does not have. A word begins in the completion."""
    words = bad_word_table([[5], [3, 4], [3, 3, 6], [3, 9]], torch.device("cpu"))
    assert bad_word_table([], torch.device("cpu")) is None
    for completion, expected in [([], {5}), ([3], {4, 5}), ([3, 3], {4, 5, 6}), ([4, 3, 3], {4, 5, 6}), ([3, 1], {5})]:
        banned = banned_tokens(words, torch.tensor([completion], dtype=torch.long), 8)
        assert banned.shape == (1, 8) and set(banned[0].nonzero()[:, 0].tolist()) == expected


@pytest.mark.parametrize(
    ("truncation", "allowed"),
    [
        ({}, {0, 2, 3}),
        ({"top_k": 2}, {0, 2}),
        ({"top_p": 0.6}, {0, 2}),
        ({"top_p": 0.4}, {2}),
        ({"min_p": 0.4}, {0, 2}),
        ({"min_p": 0.3}, {0, 2, 3}),
        ({"temperature": 0.0}, {2}),
    ],
)
def test_truncation_goes_by_what_bad_words_leave(truncation: dict[str, float], allowed: set[int]) -> None:
    """Of .16, .5, .25, .09 the second is banned: .32, .5, .18 are left, and min-p .4 asks for .2, .3 for .15. The
    log-probabilities are those of the whole."""
    probabilities = torch.tensor([0.16, 0.5, 0.25, 0.09])
    draws = 4000
    noise = (torch.arange(draws).double() + 0.5) / draws
    banned = (torch.arange(4) == 1).expand(draws, -1)
    tokens, logprobs = choose_tokens(probabilities.log().expand(draws, -1), noise, Sampling(**truncation), banned)
    kept = torch.tensor([token in allowed for token in range(4)]) * probabilities
    counts = torch.bincount(tokens, minlength=4)
    assert (counts - draws * kept / kept.sum()).abs().max() <= 1
    assert torch.allclose(logprobs, probabilities.log()[tokens], atol=1e-6)


def test_tokens_of_next_to_no_probability_are_drawn_and_scored_where_a_bad_word_leaves_no_other() -> None:
    """e**-200 is 0 in fp32, and its logarithm is not."""
    logits = torch.tensor([[200.0, 0.0, 0.0, -1.0]]).expand(2, -1)
    noise = torch.tensor([0.01, 0.99], dtype=torch.float64)
    tokens, logprobs = choose_tokens(
        logits, noise, Sampling(), torch.tensor([[True, False, False, False]]).expand(2, -1)
    )
    assert tokens.tolist() == [1, 3] and logprobs.tolist() == [-200.0, -201.0]


def test_bad_words_are_tokenized_alone_and_after_a_space() -> None:
    """After a space only where that is as many tokens with another first one, as in vLLM."""
    tokenizer = LetterTokenizer()
    assert bad_word_tokens((" ab", "c"), tokenizer) == [[0, 1], [26, 1], [2], [28]]
    tokenizer.encode = lambda text, add_special_tokens: (
        [9] * text.count(" ") + [ord(letter) - 97 for letter in text.strip()]
    )
    assert bad_word_tokens(("ab",), tokenizer) == [[0, 1]]
    tokenizer.encode = lambda text, add_special_tokens: [ord(letter) - 97 for letter in text.strip()]
    assert bad_word_tokens(("ab",), tokenizer) == [[0, 1]]
    tokenizer.encode = lambda text, add_special_tokens: []
    with pytest.raises(ValueError, match="bad_words holds 'ab', which has no tokens"):
        bad_word_tokens(("ab",), tokenizer)


# ---- ends ------------------------------------------------------------------------------------------------------------


def test_stop_token_is_kept_and_a_truncated_completion_has_none() -> None:
    """Free completions of 16 tokens, cut after their first stop token, are the completions with stop tokens."""
    model = build_model(std=0.1)
    stops = set(range(0, VOCABULARY, 12))
    free = sample(model, n=8, max_completion_length=16)
    groups = sample(model, n=8, max_completion_length=16, stop_token_ids=tuple(stops))
    reasons = set()
    for completion, whole in zip(itertools.chain(*groups), itertools.chain(*free), strict=True):
        places = [place for place, token in enumerate(whole.token_ids) if token in stops]
        length = places[0] + 1 if places else 16
        assert completion.token_ids == whole.token_ids[:length]
        assert completion.logprobs == pytest.approx(whole.logprobs[:length], abs=1e-5)
        assert completion.finish_reason == ("stop" if places else "length")
        reasons.add(completion.finish_reason)
    assert reasons == {"stop", "length"}


def test_stop_token_as_the_last_allowed_token_is_a_stop() -> None:
    model = build_model()
    token = sample(model, [PROMPTS[0]], temperature=0.0, max_completion_length=1)[0][0].token_ids[0]
    completion = sample(model, [PROMPTS[0]], temperature=0.0, max_completion_length=1, stop_token_ids=(token,))[0][0]
    assert (completion.token_ids, completion.finish_reason) == ([token], "stop")


def test_stop_tokens_are_those_of_model_tokenizer_and_sampling() -> None:
    """Greedy tokens t0, t1, t2, ...: each source alone stops at its own token."""
    model = build_model()
    greedy = sample(model, [PROMPTS[4]], temperature=0.0, max_completion_length=6)[0][0].token_ids
    first, second, third = list(dict.fromkeys(greedy))[:3]
    tokenizer = LetterTokenizer()
    tokenizer.eos_token_id = second

    def length(tokenizer: LetterTokenizer | None, **sampling: object) -> int:
        out = sample(model, [PROMPTS[4]], tokenizer=tokenizer, temperature=0.0, max_completion_length=6, **sampling)
        return len(out[0][0].token_ids)

    assert length(None, stop_token_ids=(third,)) == greedy.index(third) + 1
    assert length(tokenizer, stop_token_ids=(third,)) == greedy.index(second) + 1
    model.generation_config.eos_token_id = [first, 1000]
    assert length(tokenizer) == greedy.index(first) + 1
    model.generation_config.eos_token_id = first
    assert length(None) == greedy.index(first) + 1


def test_stop_string_ends_a_completion_with_the_token_that_completes_it() -> None:
    """The shortest prefix of the free completion whose text holds a stop string, which stays in it."""
    model = build_model(std=0.1)
    tokenizer = LetterTokenizer()
    strings = ("ab", "q", "xyz", "th")
    free = sample(model, n=8, tokenizer=tokenizer, max_completion_length=24)
    groups = sample(model, n=8, tokenizer=tokenizer, max_completion_length=24, stop=strings)
    hits = 0
    for completion, whole in zip(itertools.chain(*groups), itertools.chain(*free), strict=True):
        prefixes = [whole.token_ids[:length] for length in range(1, 25)]
        texts = tokenizer.batch_decode(prefixes, True, False)
        holding = [place for place, text in enumerate(texts) if any(string in text for string in strings)]
        expected = prefixes[holding[0]] if holding else whole.token_ids
        assert completion.token_ids == expected
        assert completion.text == tokenizer.batch_decode([expected], True, False)[0]
        assert completion.finish_reason == ("stop" if holding else "length")
        hits += bool(holding)
    assert 0 < hits < 40


@pytest.mark.parametrize("check_every", [3, 8, 50])
def test_rare_checks_change_no_completion(check_every: int) -> None:
    """What is decoded between a stop and the next look is cut off, whether a token or a string stopped it."""
    model = build_model(std=0.1)
    arguments = dict(
        n=8, tokenizer=LetterTokenizer(), max_completion_length=22, stop=("ab", "q"), stop_token_ids=(3, 40)
    )
    groups = sample(model, check_every=check_every, **arguments)
    for completion, expected in zip(
        itertools.chain(*groups), itertools.chain(*sample(model, **arguments)), strict=True
    ):
        assert completion.token_ids == expected.token_ids
        assert completion.finish_reason == expected.finish_reason


def test_earlier_of_stop_token_and_stop_string_wins() -> None:
    model = build_model(std=0.1)
    tokenizer = LetterTokenizer()
    stops = set(range(0, VOCABULARY, 15))
    free = sample(model, n=8, tokenizer=tokenizer, max_completion_length=24)
    groups = sample(model, n=8, tokenizer=tokenizer, max_completion_length=24, stop=("q",), stop_token_ids=tuple(stops))
    for completion, whole in zip(itertools.chain(*groups), itertools.chain(*free), strict=True):
        ends = [
            place + 1
            for place, token in enumerate(whole.token_ids)
            if token in stops or tokenizer.batch_decode([[token]], True, False)[0] == "q"
        ]
        assert completion.token_ids == whole.token_ids[: ends[0] if ends else 24]


# ---- work ------------------------------------------------------------------------------------------------------------


def test_each_distinct_prompt_is_computed_once() -> None:
    """Five prompts, two the same, 6 completions each: one forward of 4 rows of 9 columns, then 30 rows of 1."""
    model = build_model()
    log = ForwardLog(model)
    sample(model, n=6, max_completion_length=4)
    assert log.shapes == [(4, 9), (30, 1), (30, 1), (30, 1)]


def test_prefill_keeps_its_token_budget() -> None:
    """Lengths 1, 4, 5, 9 and a budget of 10: {1, 4} is 2 x 4, a third would make 3 x 5; 5 and 9 go alone."""
    model = build_model()
    log = ForwardLog(model)
    whole = sample(model, n=2, max_completion_length=1)
    log.shapes.clear()
    assert tokens_of(sample(model, n=2, max_completion_length=1, prefill_token_budget=10)) == tokens_of(whole)
    assert log.shapes == [(2, 4), (1, 5), (1, 9)]


def test_finished_sequences_leave_the_batch() -> None:
    """Rows times steps stay within a quarter of the tokens that had to be sampled (the last ones need no forward)."""
    model = build_model(std=0.05)
    log = ForwardLog(model)
    groups = sample(model, n=30, max_completion_length=60, stop_token_ids=tuple(range(0, VOCABULARY, 8)))
    lengths = [len(completion.token_ids) for group in groups for completion in group]
    assert min(lengths) < 4 and max(lengths) > 20
    assert log.shapes[0] == (4, 9)
    rows = [shape[0] for shape in log.shapes[1:]]
    assert rows == sorted(rows, reverse=True)
    assert sum(rows) <= 1.25 * sum(length - 1 for length in lengths)
    assert len(rows) == max(lengths) - 1


def test_decode_batch_is_bounded() -> None:
    model = build_model()
    log = ForwardLog(model)
    sample(model, n=4, max_completion_length=5, max_decode_batch=6)
    assert max(rows for rows, columns in log.shapes[1:]) == 6
    assert sum(columns > 1 for _, columns in log.shapes) == 1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_mode_is_restored_and_the_cache_is_used(checkpointing: bool) -> None:
    """A module in evaluation mode inside a training model stays so; gradient checkpointing does not undo the cache."""
    model = build_model()
    expected = tokens_of(sample(model, n=2, max_completion_length=5))
    model.train()
    model.lm_head.eval()
    if checkpointing:
        model.gradient_checkpointing_enable()
    before = [module.training for module in model.modules()]
    log = ForwardLog(model)
    assert tokens_of(sample(model, n=2, max_completion_length=5)) == expected
    assert [module.training for module in model.modules()] == before
    assert [columns for _, columns in log.shapes] == [9, 1, 1, 1, 1]
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_training_mode_is_restored_after_an_error() -> None:
    model = build_model().train()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="NaN or inf"):
        sample(model, max_completion_length=3)
    assert model.training


def test_adapter_is_sampled_with_the_base() -> None:
    """A LoRA policy samples like the merged model, and dropout is off while it does."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build_model(), LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    model.train()
    groups = sample(model, n=2, temperature=0.9, max_completion_length=8)
    base = sample(build_model(), n=2, temperature=0.9, max_completion_length=8)
    assert tokens_of(groups) != tokens_of(base)
    model.eval()
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for completion in group:
            expected = scored(model, prompt, completion.token_ids, 0.9)
            assert torch.allclose(torch.tensor(completion.logprobs), expected, atol=1e-5, rtol=0)


def test_autocast_of_the_trainer_is_used() -> None:
    """bf16 autocast: the log-probabilities are those of a forward under the same autocast, and not of fp32."""
    model = build_model()
    seen = set()
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    config = RolloutConfig(max_completion_length=6, engine="transformers")
    engine = build_engine(config, model, None, autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    completion = engine.sample([PROMPTS[0]], n=1, sampling=config, seed=0, prompt_numbers=[0])[0][0]
    assert seen == {torch.bfloat16}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = scored(model, PROMPTS[0], completion.token_ids)
    assert torch.allclose(torch.tensor(completion.logprobs), expected, atol=0.15)


# ---- the protocol ----------------------------------------------------------------------------------------------------


def test_completion_carries_the_weight_version_of_the_last_sync() -> None:
    model = build_model()
    engine = build_engine(RolloutConfig(), model, LetterTokenizer())
    arguments = dict(n=1, sampling=Sampling(max_completion_length=2), seed=0, prompt_numbers=[0])
    assert engine.sample([[1, 2]], **arguments)[0][0].weight_version == 0
    report = engine.sync(model)
    assert (report.weight_version, report.bytes, report.tensors) == (1, 0, 0)
    assert engine.sample([[1, 2]], **arguments)[0][0].weight_version == 1
    with pytest.raises(ValueError, match="build the engine with the policy"):
        engine.sync(build_model())
    assert engine.weight_version == 1


def test_weights_changed_in_place_are_sampled() -> None:
    model = build_model()
    before = tokens_of(sample(model, temperature=0.0, max_completion_length=6))
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.roll(1, 0))
    assert tokens_of(sample(model, temperature=0.0, max_completion_length=6)) != before


def test_no_prompts_give_no_completions() -> None:
    assert sample(build_model(), []) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompts": [[1], []]}, "prompt 1 .* no tokens"),
        ({"n": 0}, "n is 0"),
        ({"numbers": [1]}, "5 prompts and 1 prompt_numbers"),
        ({"stop_token_ids": (95, 96)}, "stop_token_ids holds 96, and the model has 96 tokens"),
        ({"stop": ("x",)}, "stop strings need a tokenizer"),
        ({"bad_words": ("x",)}, "bad_words needs a tokenizer"),
        ({"structured_outputs_regex": "x"}, "structured_outputs_regex .* set engine to vllm"),
    ],
)
def test_bad_calls_are_refused(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sample(build_model(), **arguments)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("engine", "sglang"),
        ("num_generations", 0),
        ("max_completion_length", 0),
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("min_p", 1.0),
        ("stop", [""]),
        ("stop_token_ids", [-1]),
        ("bad_words", ["word", " \n"]),
        ("structured_outputs_regex", ""),
        ("structured_outputs_json", {}),
        ("max_decode_batch", -1),
        ("prefill_token_budget", 0),
    ],
)
def test_values_out_of_range_are_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        RolloutConfig(**{field: value})


@pytest.mark.parametrize(
    "mask", [{"bad_words": ["b"]}, {"structured_outputs_regex": "x+"}, {"structured_outputs_json": {"type": "null"}}]
)
def test_a_config_is_the_sampling(mask: dict[str, Any]) -> None:
    kind = RolloutConfig if "bad_words" in mask else Sampling  # no engine does the others at this temperature
    config = kind(temperature=0.5, top_p=0.9, top_k=3, min_p=0.1, stop=["a"], stop_token_ids=[4], **mask)
    assert config.restrictions == ["top_p", "top_k", "min_p", *mask]
    assert RolloutConfig(stop=["a"]).restrictions == []
    shared = {leaf.name for leaf in dataclasses.fields(Sampling)}
    given = {name: value for name, value in dataclasses.asdict(config).items() if name in shared}
    assert dataclasses.asdict(config.greedy()) == given | {"temperature": 0.0}


@pytest.mark.parametrize("engine", ["vllm", "vllm-server"])
def test_an_engine_that_is_not_installed_says_how_to_get_it(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="install_vllm_cpu.sh.*set engine to transformers"):
        build_engine(RolloutConfig(engine=engine), build_model(), None)


def test_auto_is_the_embedded_engine_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert isinstance(build_engine(RolloutConfig(), build_model(), None), TransformersEngine)
    assert RolloutConfig() == RolloutConfig(engine="transformers")  # the config holds what auto has chosen
    with pytest.raises(ValueError, match="async_level is 1 and engine 'transformers'"):
        RolloutConfig(async_level=1)


def test_structured_outputs_are_for_vllm() -> None:
    """Said when the config is read, for the engine that `auto` chooses too."""
    for fields in ({"structured_outputs_regex": "a|b"}, {"structured_outputs_json": {"type": "null"}}):
        for engine in ("transformers", *([] if torch.cuda.is_available() else ["auto"])):
            with pytest.raises(ValueError, match=f"{next(iter(fields))} is set.*set engine to vllm"):
                RolloutConfig(engine=engine, **fields)
        RolloutConfig(engine="vllm", **fields)


@pytest.mark.parametrize("mask", [{"bad_words": ["a"]}, {"structured_outputs_json": {"type": "null"}}])
def test_a_regular_expression_stands_alone(mask: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"(?s)(?=.*structured_outputs_regex).*{next(iter(mask))}"):
        RolloutConfig(structured_outputs_regex="b", **mask)


@pytest.mark.parametrize(
    "fields",
    [{"top_k": 4}, {"min_p": 0.1}, {"top_p": 0.9}, {"bad_words": ["a"]}, {"structured_outputs_regex": "a"}],
)
def test_several_steps_on_restricted_samples_are_refused(fields: dict[str, Any]) -> None:
    """The ratio of the second step is to a policy that could have drawn other tokens."""
    sampling = RolloutConfig(engine="vllm", **fields)
    GrpoConfig(rollout=sampling)
    GrpoConfig(rollout=RolloutConfig(stop=["a"]), num_iterations=2)
    with pytest.raises(ValueError, match=f"num_iterations above 1 with {next(iter(fields))}"):
        GrpoConfig(rollout=sampling, num_iterations=2)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"temperature": 0.7, "bad_words": ["a"]}, "temperature is 0.7 and bad_words"),
        ({"temperature": 0.7, "top_p": 0.9}, "temperature is 0.7 and top_p 0.9"),
        ({"temperature": 0.7, "top_k": 4}, "temperature is 0.7 and top_k 4"),
        ({"min_p": 0.1, "top_p": 0.9}, "min_p and top_p"),
        ({"temperature": 0.001}, "raises to 0.01"),
        ({"temperature": 2.5}, "temperature is 2.5.*at most 2"),
    ],
)
def test_what_vllm_cannot_sample_or_score_exactly_is_refused(fields: dict[str, float], words: str) -> None:
    """The embedded engine takes all of it."""
    RolloutConfig(engine="transformers", **fields)
    for engine in ("vllm", "vllm-server"):
        with pytest.raises(ValueError, match=words):
            RolloutConfig(engine=engine, **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"weight_sync": "lora"},
        {"weight_transfer": "mpi"},
        {"vllm_dtype": "fp8"},
        {"num_servers": 0},
        {"vllm_max_num_seqs": 0},
        {"vllm_gpu_memory_utilization": 1.0},
        {"request_timeout": 0.0},
        {"server_port": -1},
        {"server_urls": ["localhost:8000"]},
        {"num_servers": 2, "server_urls": ["http://localhost:8000"]},
        {"sync_dir": "s3://bucket/prefix"},
    ],
)
def test_vllm_settings_out_of_range_are_named(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        RolloutConfig(**fields)


# ---- what a disagreement means ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cause", ["truncated", "temperature", "dtype", "stale", "tokenizer", "finite"])
def test_a_mismatch_names_the_worst_token_and_its_likely_cause(cause: str) -> None:
    """400 tokens drawn from 400 distributions over 50; the sampler's numbers are wrong in one of six ways."""
    torch.manual_seed(0)
    logits = 2 * torch.randn(400, 50)
    tokens = torch.distributions.Categorical(logits=logits).sample()

    def of(values: torch.Tensor) -> torch.Tensor:
        return values.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]

    scored = of(logits)
    kept = logits >= logits.gather(-1, tokens[:, None]).minimum(logits.topk(10, -1).values[:, -1:])
    rounded = scored.clone()
    rounded[7] += 1.0
    sampled = {
        "truncated": of(logits.masked_fill(~kept, -torch.inf)),
        "temperature": of(logits / 0.6),
        "dtype": rounded,
        "stale": of(logits + 0.3 * torch.randn(400, 50)),
        "tokenizer": of(2 * torch.randn(400, 50)),
        "finite": scored.masked_fill(torch.arange(400) == 3, torch.nan),
    }[cause]
    sentence = explain_mismatch(sampled, scored, tokens, limit=0.05)
    assert sentence is not None and cause in sentence
    assert explain_mismatch(scored, scored, tokens, limit=0.05) is None
    if cause == "dtype":
        assert f"token {int(tokens[7])} (number 7 of 400)" in sentence


def test_completions_that_outgrow_learned_positions_are_refused_before_anything_is_sampled():
    """GPT-2 has no position after its last; a rotary model computes one."""
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=4, n_positions=16, eos_token_id=None)
    call = {"n": 1, "seed": 0, "prompt_numbers": [4]}
    engine = TransformersEngine(AutoModelForCausalLM.from_config(config), None)
    assert len(engine.sample([[5] * 9], sampling=Sampling(max_completion_length=7), **call)[0][0].token_ids) == 7
    with pytest.raises(ValueError, match="number 4.* has 9 tokens.*max_completion_length 8 .* 16 positions"):
        engine.sample([[5] * 9], sampling=Sampling(max_completion_length=8), **call)
    engine = TransformersEngine(
        AutoModelForCausalLM.from_config(LlamaConfig(**WIDTHS, max_position_embeddings=16)), None
    )
    assert engine.sample([[5] * 9], sampling=Sampling(max_completion_length=8), **call)
