"""The packed forward equals the plain padded one: values and gradients, over many architectures."""

import copy
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM
from transformers import models as hf

from data.chat import Example, Pair
from data.pack import Segment, empty_batch, pack_check, pack_examples, pack_groups, pack_pairs, pack_tree
from loops.shared.attention import Layout, NotPackable
from loops.shared.policy import (
    check_context,
    check_policy,
    choose_packing,
    compile_layers,
    enable_packing,
    is_packed,
    score,
    score_plain,
    self_check,
)
from loops.shared.reference import build_reference
from loops.shared.sharding import build_accelerator, prepare, read_sharding

SMALL = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MOE = {
    "experts_implementation": "eager",
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
EXACT = {
    "LlamaConfig": {},
    "Qwen2Config": {},
    "Qwen3Config": {"tie_word_embeddings": True},
    "Qwen3MoeConfig": MOE,
    "MistralConfig": {"sliding_window": 5},
    "MixtralConfig": MOE,
    "Gemma2Config": {
        "sliding_window": 5,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 5.0,
        "query_pre_attn_scalar": 16,
    },
    "Gemma3TextConfig": {"sliding_window": 5, "query_pre_attn_scalar": 16},
    "Phi3Config": {},
    "Olmo2Config": {},
    "GraniteConfig": {
        "logits_scaling": 3.0,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.5,
        "embedding_multiplier": 2.0,
    },
    "CohereConfig": {"logit_scale": 0.3},
    "Cohere2Config": {"logit_scale": 0.3, "sliding_window": 5},
    "GPTNeoXConfig": {},
    "SmolLM3Config": {},
    "Starcoder2Config": {"sliding_window": 5},
    "GptOssConfig": {**MOE, "sliding_window": 5},
    "GPT2Config": {"n_embd": 64, "n_layer": 2, "n_head": 4},
    "OPTConfig": {"ffn_dim": 64, "word_embed_proj_dim": 64},
    "Exaone4Config": {"sliding_window": 5, "sliding_window_pattern": 2},  # global layers pass None for the window
}
FALLS_BACK = {
    "JambaConfig": {},
    "Lfm2Config": {"layer_types": ["conv", "full_attention"]},
    "StableLmConfig": {},
    "MambaConfig": {"state_size": 4},
    "BloomConfig": {"n_head": 4, "n_layer": 2},
    "PhimoeConfig": {**MOE, "sliding_window": 4096},  # the window stands in the mask alone
    "DeepseekV32Config": {  # keys are chosen by an indexer, which leaves that to an attention that it does not know
        "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
        "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
        "moe_intermediate_size": 32, "index_head_dim": 16, "index_n_heads": 2, "index_topk": 3,
    },
}  # fmt: skip


def checked(model, batch, said=None, packing=True) -> bool:
    """Whether the packed path is taken, after the two steps that a loop takes."""
    print_main = print if said is None else said.append
    choose_packing(model, packing=packing, compile=False, print_main=print_main)
    given = {"longest": 40, "setting": "max_seq_length", "print_main": print_main}
    check_policy(model, batch, Accelerator(cpu=True), **given)
    return is_packed(model)


def tiny(name: str, extra: dict, dtype=torch.float64, **more):
    if not hasattr(hf, name):
        pytest.skip(f"this transformers has no {name}")
    torch.manual_seed(0)
    config = getattr(hf, name)(**{**SMALL, **extra, **more})
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():  # sharp enough that a wrong attention pattern or a forgotten scale shows
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.3 if p.ndim == 1 else 0.1))
    return model.eval()


def groups(seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(3, 96, (n,), generator=g).tolist()  # noqa: E731
    return [(draw(7), [draw(9), draw(1), draw(12)]), (draw(1), [draw(4)]), (draw(15), [draw(3), draw(8)])]


def gradients(model, batch, packing: bool, temperature: float = 0.7):
    model.zero_grad()
    scores = (score if packing else score_plain)(model, batch, temperature)
    weights = torch.linspace(-1, 1, scores.logprobs.numel(), dtype=scores.logprobs.dtype).view_as(scores.logprobs)
    (scores.logprobs * weights * batch.mask).sum().backward()
    return scores, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", EXACT)
def test_packed_groups_equal_plain_padding(name, only_float64):
    """The reference is an untouched twin with transformers' own attention."""
    model = tiny(name, EXACT[name])
    twin = copy.deepcopy(model)
    eager = name in ("Gemma2Config", "GptOssConfig")
    twin.set_attn_implementation("eager" if eager else "sdpa")
    limit = 1e-10
    enable_packing(model)
    batch = pack_groups(groups())
    assert batch.num_tokens == 7 + 22 + 1 + 4 + 15 + 11  # each prompt once
    packed, packed_grads = gradients(model, batch, True)
    plain, plain_grads = gradients(twin, batch, False)
    assert (packed.logprobs - plain.logprobs).abs().max() < limit
    assert (packed.entropy - plain.entropy).abs().max() < limit
    assert packed_grads.keys() == plain_grads.keys()
    for key, expected in plain_grads.items():
        # a key's bias moves no softmax: its gradient is rounding, 1e-16, on both sides
        assert (packed_grads[key] - expected).norm() <= limit * max(expected.norm(), 1e-3), key


@pytest.mark.parametrize("name", FALLS_BACK)
def test_other_layers_fall_back_with_a_reason(name):
    said = []
    model, batch = tiny(name, FALLS_BACK[name], dtype=torch.float32), pack_groups(groups())
    before = score_plain(model, batch).logprobs
    assert not checked(model, batch, said) and "packing: off" in said[0]
    assert torch.equal(score_plain(model, batch).logprobs, before)  # the plain path is the model's own again


def on_two_shards(names):
    torch.set_num_threads(1)
    sharding = read_sharding("full_shard", {}, False)
    accelerator = build_accelerator(sharding, precision="no", on_cpu=True, processes=2, per_machine=2)
    for name in names:
        plain, model = (tiny(name, FALLS_BACK[name], dtype=torch.float32) for _ in range(2))
        batch, said = pack_groups(groups()), []
        expected = score_plain(plain, batch).logprobs
        expected.sum().backward()
        choose_packing(model, packing=True, compile=False, print_main=said.append)
        reference = build_reference(model)
        optimizer = torch.optim.SGD(model.parameters())
        policy, optimizer = prepare(accelerator, model, optimizer, reference=reference, sharding=sharding)
        assert is_packed(policy) and is_packed(reference.model)
        given = {"longest": 40, "setting": "max_seq_length", "print_main": said.append, "reference": reference}
        check_policy(policy, batch, accelerator, **given)
        assert not is_packed(policy) and "packing: off" in said[0] and "FSDP" not in said[0], said
        logprobs = score(policy, batch).logprobs
        logprobs.sum().backward()
        assert torch.equal(logprobs, expected) and torch.equal(reference.logprobs(batch), expected)
        for parameter, other in zip(policy.parameters(), plain.parameters(), strict=True):
            if other.grad is not None:
                assert (parameter.grad.full_tensor() - other.grad).abs().max() < 1e-5
        accelerator.free_memory()


@pytest.mark.slow
def test_a_sharded_policy_falls_back_with_its_reference():
    """The check runs after sharding; a packed forward that fails half-way leaves nothing behind on any process."""
    names = [name for name in ("PhimoeConfig", "DeepseekV32Config") if hasattr(hf, name)]
    code = (
        "from accelerate import debug_launcher; from tests.loops.test_policy import on_two_shards;"
        f"debug_launcher(on_two_shards, ({names!r},), num_processes=2)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_examples_and_pairs_equal_plain_padding(only_float64):
    model = tiny("Qwen3Config", {})
    enable_packing(model)
    g = torch.Generator().manual_seed(1)
    ids = lambda n: torch.randint(3, 96, (n,), generator=g).tolist()  # noqa: E731
    examples = [Example(ids(n), [bool(i % 3) for i in range(n)]) for n in (1, 5, 17, 5)]
    for batch in (pack_examples(examples), pack_pairs([Pair(ids(4), ids(3), ids(6)), Pair(ids(9), ids(1), ids(2))])):
        (packed, a), (plain, b) = gradients(model, batch, True), gradients(model, batch, False)
        assert (packed.logprobs - plain.logprobs).abs().max() < 1e-10
        assert all((a[k] - b[k]).norm() <= 1e-10 * max(b[k].norm(), 1e-6) for k in b)


def test_gradient_checkpointing_changes_nothing():
    model = tiny("Qwen3Config", {})
    enable_packing(model)
    batch = pack_groups(groups())
    _, plain = gradients(model, batch, True)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    _, checkpointed = gradients(model, batch, True)
    assert all(torch.equal(plain[k], checkpointed[k]) for k in plain)


def test_an_empty_batch_gives_every_trained_weight_a_zero_gradient():
    """So that a process with nothing to do still joins the reductions of the others."""
    model = tiny("Qwen3Config", {"tie_word_embeddings": True})
    enable_packing(model)
    for packing in (True, False):
        model.zero_grad()
        (score if packing else score_plain)(model, empty_batch()).logprobs.sum().backward()
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_compiled_layers_give_the_same_gradients_and_compile_once():
    """Batches of other sizes after the first compile nothing more; the plain path compiles nothing either."""
    import torch._dynamo as dynamo

    dynamo.reset()
    plain, model = (tiny("Qwen3Config", {}, dtype=torch.float32, num_hidden_layers=1) for _ in range(2))
    for policy in (plain, model):
        enable_packing(policy)
    compile_layers(model)
    graphs = []
    for seed in range(4):
        batch = pack_groups(groups(seed)[: 1 + seed % 3] * (1 + seed))
        (_, expected), (_, compiled) = gradients(plain, batch, True), gradients(model, batch, True)
        assert all((expected[k] - compiled[k]).norm() <= 1e-4 * expected[k].norm().clamp(min=1e-3) for k in expected)
        graphs.append(dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and len(set(graphs)) == 1
    gradients(model, batch, False)  # the plain path runs them uncompiled
    assert dynamo.utils.counters["stats"]["unique_graphs"] == graphs[0]


def test_running_out_of_memory_is_no_reason_to_leave_packing():
    """The plain path needs more of it; the error must reach the user as what it is."""
    model = tiny("Qwen3Config", {}, dtype=torch.float32)

    def full(module, inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model.model.layers[0].register_forward_pre_hook(full)
    with pytest.raises(torch.OutOfMemoryError):
        checked(model, pack_groups(groups()))


def test_self_check_stops_a_model_that_disagrees():
    """A head that scales its logits by a number that the config does not tell."""
    model = tiny("Qwen3Config", {}, dtype=torch.float32)
    enable_packing(model)
    original = model.lm_head.forward
    model.lm_head.forward = lambda hidden, *rest: original(hidden, *rest) if rest else 2 * original(hidden)
    with pytest.raises(ValueError, match="packing: false"):
        self_check(model, pack_groups(groups()), compute_dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("moved", [1, 4, 40])
def test_in_16_bits_a_router_may_move_a_token_but_nothing_a_row(dtype, moved):
    """Of a row's 27 or 40 tokens; which router rounds the other way is a matter of kernels, so it is played here."""
    model = tiny("Qwen3Config", {}, dtype=dtype)
    enable_packing(model)
    original = model.lm_head.forward

    def forward(hidden, *rest):
        if not rest:
            return original(hidden)
        logprobs, entropy = original(hidden, *rest)
        return torch.cat([logprobs[:moved] + 1, logprobs[moved:]]), entropy

    model.lm_head.forward = forward
    rows = pack_check([list(range(3, 90)), list(range(5, 90))], 4096)
    if dtype.itemsize == 2 and moved < 10:
        assert self_check(model, rows, compute_dtype=dtype)[0] < 0.03
    else:
        with pytest.raises(ValueError, match="packing: false"):
            self_check(model, rows, compute_dtype=dtype)


def test_the_exported_config_names_the_architecture(tmp_path):
    model = tiny("Qwen3Config", {}, dtype=torch.float32)
    enable_packing(model)
    model.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert '"Qwen3ForCausalLM"' in text and "plumbline" not in text


@pytest.mark.parametrize("name", ["MistralConfig", "Exaone4Config"])
def test_the_check_reaches_a_window_wider_than_its_rows(name, monkeypatch):
    """80 tokens against a window of 4096: a packed attention that forgot windows must not pass."""
    from loops.shared import attention

    rows = pack_check([list(range(3, 90))], 4096)
    extra = EXACT[name] | {"sliding_window": 4096, "max_position_embeddings": 8192}
    assert checked(tiny(name, extra, dtype=torch.float32), rows)
    model, said = tiny(name, extra, dtype=torch.float32), []
    monkeypatch.setattr(attention, "_window", lambda module, sliding_window: None)
    assert not checked(model, rows, said) and "mask" in said[0]
    assert model.config.sliding_window == 4096  # nothing of the check stays


def test_the_checks_rows_share_their_prompts():
    """Two prompts and four completions are 6 segments; short rows are repeated, none passes the longest of the run."""
    batch = pack_check([[5, 6, 7], [8] * 200], 1000)
    assert [s.prefix for s in batch.segments] == [-1, 0, 0, -1, 3, 3]
    assert batch.padded()[0].shape == (4, 80) and batch.input_ids[0, :6].tolist() == [5, 6, 7, 5, 6, 7]
    for longest in (2, 3, 20):
        assert pack_check([[5]], longest).padded()[0].shape == (4, longest)


def test_only_the_self_check_takes_an_error_for_a_model_that_is_not_packable():
    """Later in a run, a peer that died in an all-gather is told as what it is."""
    model = tiny("Qwen3Config", {}, dtype=torch.float32)

    def closed(module, inputs):
        raise RuntimeError("Connection closed by peer")

    handle = model.model.layers[0].register_forward_pre_hook(closed)
    said = []
    enable_packing(model)
    with pytest.raises(RuntimeError, match="^Connection closed by peer$") as caught:
        score(model, pack_groups(groups()))
    assert not isinstance(caught.value, NotPackable)
    handle.remove()
    assert checked(model, pack_groups(groups()), said)


@pytest.mark.parametrize("packing", [True, False])
def test_a_model_that_sees_its_targets_is_refused(packing):
    torch.manual_seed(0)
    shape = dict(vocab_size=96, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    model = hf.BertLMHeadModel(hf.BertConfig(**shape, is_decoder=False))
    with pytest.raises(ValueError, match="model_id: BertLMHeadModel is not causal.*is_decoder"):
        checked(model, pack_groups(groups()), packing=packing)
    decoder = hf.BertLMHeadModel(hf.BertConfig(**shape, is_decoder=True))
    assert not checked(decoder, pack_groups(groups()), packing=False)


def test_a_model_that_sees_its_targets_is_refused_in_bfloat16_too():
    """Its small logits move by less than 0.2, which is much of what they are; rounding is a tenth at most."""
    shape = dict(num_hidden_layers=6, intermediate_size=64, is_decoder=False)
    model = tiny("BertConfig", shape, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="BertLMHeadModel is not causal"):
        checked(model, pack_groups(groups()), packing=False)


def test_rows_beyond_the_models_positions():
    """Learned positions end; rotary ones go on, which is worth a note."""
    said = []
    for name in ("GPT2Config", "OPTConfig"):
        model = tiny(name, EXACT[name], dtype=torch.float32)
        check_context(model, 128, setting="max_seq_length", print_main=said.append)
        with pytest.raises(ValueError, match="129 tokens and the model only 128 positions .*lower max_seq_length"):
            check_context(model, 129, setting="max_seq_length", print_main=said.append)
    model = tiny("Qwen3Config", {}, dtype=torch.float32)
    check_context(model, 128, setting="max_seq_length", print_main=said.append)
    assert not said
    check_context(model, 129, setting="max_seq_length", print_main=said.append)
    assert "129 tokens" in said[0] and "128 positions" in said[0]


@pytest.mark.parametrize("name", ["LlamaConfig", "Exaone4Config", "GptOssConfig"])
def test_a_tree_of_segments_equals_plain_padding(name, only_float64):
    """A prompt, turns that share their beginnings, three levels below it, and a root without children beside them; each
    row is a path from its root, and the windows of 5 tokens reach over more than one segment."""
    model = tiny(name, EXACT[name])
    enable_packing(model)
    g = torch.Generator().manual_seed(2)
    draw = lambda n: torch.randint(3, 96, (n,), generator=g).tolist()  # noqa: E731
    shape = [(6, -1), (3, 0), (2, 1), (9, 2), (4, 2), (1, 1), (7, 0), (1, -1), (5, 7)]  # length, parent
    batch = pack_tree([(draw(length), [True] * length, parent) for length, parent in shape])
    assert len(batch.mask) == 5 and batch.num_tokens == sum(length for length, _ in shape)
    (packed, a), (plain, b) = gradients(model, batch, True), gradients(model, batch, False)
    assert (packed.logprobs - plain.logprobs).abs().max() < 1e-9
    assert (packed.entropy - plain.entropy).abs().max() < 1e-9
    assert all((a[k] - b[k]).norm() <= 1e-9 * max(b[k].norm(), 1e-3) for k in b)


def test_the_flash_layout_lists_every_key_of_a_path():
    """Segments 0-2, 3-4 (continues the first) and 5 (continues the second): 3, 5 and 6 keys."""
    layout = Layout((Segment(0, 3, -1), Segment(3, 2, 0), Segment(5, 1, 1)), torch.device("cpu"))
    index, queries, keys, longest_query, longest_key = layout.flash()
    assert index.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5]
    assert queries.tolist() == [0, 3, 5, 6] and keys.tolist() == [0, 3, 8, 14]
    assert (longest_query, longest_key) == (3, 6)
