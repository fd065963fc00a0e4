"""Models: what is built, what trains, what the reference is, and that an exported folder gives the same logits."""

from __future__ import annotations

import copy
import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from loops.shared.adapters import ADAPTER
from loops.shared.layers import parameter_counts
from loops.shared.models import (
    ModelConfig,
    build_policy,
    build_tokenizer,
    check_vocabulary,
    find_source,
    parameter_line,
)
from loops.shared.reference import build_reference
from loops.shared.weights import export_model, iter_weights

VOCABULARY = 64
SHAPE = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    initializer_range=0.1,  # larger than usual, so that logits are of order 1 and differences show
    eos_token_id=1,
)
STORIES = Path(__file__).resolve().parents[2].parent / "shared" / "models" / "stories260k"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}<eos>{% endfor %}"


def save_tokenizer(folder: Path, **special: str) -> PreTrainedTokenizerFast:
    words = {"<unk>": 0, "<eos>": 1, **{f"w{number}": number for number in range(2, VOCABULARY)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_model(folder: Path, kind: str = "qwen3", **changes) -> str:
    """A tiny random model with a tokenizer; returns its folder as a model_id."""
    torch.manual_seed(0)
    if kind == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**{**SHAPE, "tie_word_embeddings": True, **changes}))
    else:
        tied = kind == "llama-tied"
        model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "tie_word_embeddings": tied, **changes}))
    model.save_pretrained(folder)
    save_tokenizer(folder, eos_token="<eos>")
    return str(folder)


@pytest.fixture(params=["qwen3", "llama-tied", "llama-untied"])
def any_model(request, tmp_path) -> str:
    return save_model(tmp_path / "base", request.param)


@pytest.fixture
def model_id(tmp_path) -> str:
    return save_model(tmp_path / "base")


TOKENS = torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))  # [B, T]


def logits(model) -> torch.Tensor:
    """Logits of evaluation mode, [B, T, V]."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        out = model(TOKENS).logits
    model.train(was_training)
    return out


def train(model, steps: int = 3, learning_rate: float = 5e-3) -> list[float]:
    """A few steps of AdamW on one batch; returns the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    losses = []
    for _ in range(steps):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def build(model_id: str, *, seed: int = 3, **settings):
    return build_policy(ModelConfig(model_id=model_id, **settings), seed=seed, device="cpu")


def export(model, folder: Path, *, merge: bool, model_id: str, card: dict | None = None) -> list[str]:
    tokenizer = build_tokenizer(ModelConfig(model_id=model_id))
    return [path.name for path in export_model(model, tokenizer, folder, merge=merge, card=card or {})]


# --- the config ---


@pytest.mark.parametrize(
    ("settings", "keys"),
    [
        (dict(load_in_4bit=True, load_in_8bit=True), ("load_in_4bit", "load_in_8bit")),
        (dict(load_in_4bit=True, lora_r=0), ("load_in_4bit", "lora_r")),
        (dict(load_in_8bit=True, lora_r=0), ("load_in_8bit", "lora_r")),
        (dict(use_dora=True, lora_r=0), ("use_dora", "lora_r")),
        (dict(modules_to_save="lm_head", lora_r=0), ("modules_to_save", "lora_r")),
        (dict(load_in_4bit=True, torch_dtype="float64"), ("load_in_4bit", "torch_dtype")),
        (dict(torch_dtype="float16", lora_r=0), ("torch_dtype", "lora_r")),
        (dict(from_scratch=True, merge_weights=True, load_in_4bit=True), ("from_scratch", "load_in_4bit")),
        (dict(bnb_4bit_quant_type="int4"), ("bnb_4bit_quant_type", "nf4, fp4")),
        (dict(torch_dtype="half"), ("torch_dtype", "bfloat16")),
        (dict(bnb_4bit_compute_dtype="int8"), ("bnb_4bit_compute_dtype", "bfloat16")),
        (dict(bnb_4bit_quant_storage="int8"), ("bnb_4bit_quant_storage", "uint8")),
        (dict(lora_r=-1), ("lora_r",)),
        (dict(lora_alpha=0.0), ("lora_alpha", "lora_r")),
        (dict(lora_dropout=1.0), ("lora_dropout",)),
    ],
)
def test_impossible_combinations_name_their_keys(settings, keys):
    with pytest.raises(ValueError) as error:
        ModelConfig(**settings)
    assert all(key in str(error.value) for key in keys)
    assert "\n" not in str(error.value)


# --- tokenizer ---


def test_a_missing_pad_token_becomes_the_end_token(model_id):
    tokenizer = build_tokenizer(ModelConfig(model_id=model_id))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1


def test_a_pad_token_that_exists_is_kept(tmp_path, model_id):
    save_tokenizer(tmp_path / "padded", eos_token="<eos>", pad_token="<unk>")
    config = ModelConfig(model_id=model_id, tokenizer_id=str(tmp_path / "padded"))
    assert build_tokenizer(config).pad_token_id == 0


def test_a_tokenizer_without_end_token_is_refused(tmp_path, model_id):
    save_tokenizer(tmp_path / "endless")
    with pytest.raises(ValueError, match="tokenizer_id: .* has no eos_token"):
        build_tokenizer(ModelConfig(model_id=model_id, tokenizer_id=str(tmp_path / "endless")))


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    """64 tokens have a largest id of 63; 60 embeddings end at 59."""
    small = save_model(tmp_path / "small", vocab_size=60)
    config = ModelConfig(model_id=small, lora_r=0)
    with pytest.raises(ValueError, match="largest token id is 63, but model_id has only 60 embeddings"):
        check_vocabulary(build_tokenizer(config), build_policy(config, seed=0, device="cpu"))


# --- where weights come from ---


def test_missing_things_are_one_sentence_that_names_the_key(tmp_path, model_id, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    cases = {
        str(tmp_path / "nowhere"): "model_id: there is no folder",
        "no/such/folder": "model_id: there is no folder no/such/folder",
        str(tmp_path / "empty"): "model_id: .*empty could not be loaded: Unrecognized model",
        "nobody-at-all/no-such-model": "model_id: there is no folder nobody-at-all/no-such-model, and as a hub id",
    }
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message) as error:
            build(name)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="model_id: .* holds no tokenizer"):
        build_tokenizer(ModelConfig(model_id=str(tmp_path / "empty")))


def test_pickled_weights_are_refused(tmp_path, model_id):
    folder = Path(model_id)
    torch.save(build(model_id, lora_r=0).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="could not be loaded: Error no file named model.safetensors"):
        build(model_id)


def test_a_broken_file_and_an_unknown_attention_are_one_sentence(model_id):
    with pytest.raises(ValueError, match="model_id: .* could not be loaded: .*no_such_attention") as error:
        build(model_id, attn_implementation="no_such_attention")
    assert "\n" not in str(error.value)
    file = Path(model_id) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="model_id: .* could not be loaded: .*"):
        build(model_id)


def test_code_of_a_repository_does_not_run_unasked(tmp_path, model_id):
    config = Path(model_id) / "config.json"
    config.write_text(
        json.dumps(
            {
                "model_type": "evil",
                "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
            }
        )
    )
    (Path(model_id) / "evil.py").write_text("raise RuntimeError('it ran')")
    with pytest.raises(ValueError, match="brings its own code; set trust_remote_code: true"):
        build(model_id)


def test_a_file_that_lacks_weights_is_refused(tmp_path, model_id):
    """transformers warns and leaves what is missing random; here layer 1 of 2 is missing, 11 tensors."""
    from safetensors.torch import load_file, save_file

    file = Path(model_id) / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if ".layers.1." not in name}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 11 weights of Qwen3ForCausalLM"):
        build(model_id)


def test_dropout_of_the_base_is_off_unless_asked_for(tmp_path):
    """GPT-2 drops a tenth by default; without dropout two forwards in training mode agree."""
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    for off in (True, False):
        model = build(str(tmp_path), lora_r=0, disable_dropout=off)
        assert model.training
        assert torch.equal(model(TOKENS).logits, model(TOKENS).logits) == off


def test_from_scratch_takes_the_shape_and_draws_from_the_seed(model_id):
    (Path(model_id) / "model.safetensors").unlink()

    def weights(seed):
        return build(model_id, seed=seed, from_scratch=True, lora_r=0).state_dict()

    torch.manual_seed(123)
    state = torch.get_rng_state()
    first = weights(1)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random state moved"
    again, other = weights(1), weights(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    with pytest.raises(ValueError, match="no file named model.safetensors"):
        build(model_id, lora_r=0)


def test_adapters_are_drawn_from_the_seed_alone(model_id):
    def adapter(seed):
        torch.manual_seed(torch.seed())  # whatever the caller did before
        return {n: p for n, p in build(model_id, seed=seed).named_parameters() if p.requires_grad}

    first, again, other = adapter(1), adapter(1), adapter(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


# --- dtypes and what trains ---


@pytest.mark.parametrize(
    ("settings", "base", "trained"),
    [
        (dict(lora_r=0), torch.float32, torch.float32),
        (dict(lora_r=0, torch_dtype="bfloat16"), torch.bfloat16, torch.bfloat16),
        (dict(), torch.float32, torch.float32),
        (dict(torch_dtype="bfloat16", modules_to_save="norm"), torch.bfloat16, torch.float32),
        (dict(torch_dtype="float16"), torch.float16, torch.float32),
        (dict(torch_dtype="float64"), torch.float64, torch.float64),
    ],
)
def test_adapters_have_at_least_float32_and_follow_a_float64_base(model_id, settings, base, trained):
    policy = build(model_id, **settings)
    assert {p.dtype for p in policy.parameters() if p.requires_grad} == {trained}
    frozen = {p.dtype for p in policy.parameters() if not p.requires_grad}
    assert frozen == (set() if settings.get("lora_r") == 0 else {base})


def test_auto_dtype_follows_device_and_training():
    from loops.shared.models import resolve_dtype

    assert resolve_dtype(ModelConfig(), "cpu") == torch.float32
    assert resolve_dtype(ModelConfig(), "cuda") == torch.bfloat16
    assert resolve_dtype(ModelConfig(lora_r=0), "cuda") == torch.float32
    assert resolve_dtype(ModelConfig(lora_r=0, torch_dtype="bfloat16"), "cuda") == torch.bfloat16


@pytest.mark.parametrize("names", ["lm_head", "norm", "embed_tokens", "mlp"])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_saved_modules_train_in_float32_inside_a_bfloat16_model(tmp_path, names):
    """They compute in float32 without autocast, and a merge rounds them to the base's dtype."""
    base = save_model(tmp_path / "base", "llama-untied")
    policy = build(base, torch_dtype="bfloat16", modules_to_save=names, lora_target_modules="q_proj")
    start = logits(build(base, torch_dtype="bfloat16", lora_r=0))
    torch.testing.assert_close(logits(policy).float(), start.float(), rtol=0, atol=0.05)
    reference = build_reference(policy)
    train(policy)
    with reference.active() as model, torch.no_grad():
        assert torch.equal(model(TOKENS).logits, start)
    export(policy, tmp_path / "merged", merge=True, model_id=base)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    assert {tensor.dtype for _, tensor in iter_weights(policy)} == {torch.bfloat16}
    difference = (logits(merged).float() - logits(policy).float()).abs().mean()
    assert difference < 0.03

    export(policy, tmp_path / "adapter", merge=False, model_id=base)
    continued = build(str(tmp_path / "adapter"), torch_dtype="bfloat16")
    assert torch.equal(logits(continued), logits(policy))
    starting_adapter = build_reference(continued)
    assert starting_adapter.kind == "adapter"
    train(continued, steps=1)
    with starting_adapter.active() as model, torch.no_grad():
        assert torch.equal(model(TOKENS).logits, logits(policy))


def test_all_linear_means_every_linear_layer_but_the_head(any_model):
    """7 linear layers in each of 2 blocks: 14 adapters of 2 tensors."""
    names = [name for name, p in build(any_model).named_parameters() if p.requires_grad]
    assert len(names) == 28
    assert not any("lm_head" in name or "embed" in name for name in names)


def test_a_comma_list_chooses_modules(model_id):
    names = [n for n, p in build(model_id, lora_target_modules="q_proj, v_proj").named_parameters() if p.requires_grad]
    assert len(names) == 8 and all(".q_proj." in name or ".v_proj." in name for name in names)


def test_scaling_is_alpha_over_r_or_over_its_root(model_id):
    """r 4, alpha 8: 8 / 4 = 2, and 8 / sqrt(4) = 4."""
    for use_rslora, scaling in ((False, 2.0), (True, 4.0)):
        policy = build(model_id, lora_r=4, lora_alpha=8.0, use_rslora=use_rslora)
        layers = [module for module in policy.modules() if hasattr(module, "lora_A")]
        assert {layer.scaling[ADAPTER] for layer in layers} == {scaling}


@pytest.mark.parametrize("key", ["lora_target_modules", "modules_to_save"])
def test_names_that_bind_to_nothing_are_refused(model_id, key):
    with pytest.raises(ValueError, match=f"{key}: no module of Qwen3ForCausalLM is called v_prj; .*q_proj") as error:
        build(model_id, **{key: "q_proj,v_prj"})
    assert "\n" not in str(error.value)


def test_modules_that_cannot_be_merged_are_refused(model_id):
    with pytest.raises(ValueError, match="embed_tokens.* use_dora"):
        build(model_id, lora_target_modules="embed_tokens", use_dora=True)


def test_the_parameter_line_counts(model_id):
    """r 4 on q_proj (64 -> 64) of 2 layers: 2 * 4 * (64 + 64) = 1,024."""
    policy = build(model_id, lora_r=4, lora_target_modules="q_proj")
    base = sum(p.numel() for p in build(model_id, lora_r=0).parameters())
    assert parameter_counts(policy) == (1024, base + 1024, 4 * (base + 1024))
    assert parameter_line(policy).startswith(f"trains 1,024 of {base + 1024:,} parameters")


@pytest.mark.parametrize("lora_r", [0, 4])
def test_gradient_checkpointing_leaves_gradients_as_they_are(model_id, lora_r):
    gradients = []
    for checkpointing in (False, True):
        policy = build(model_id, lora_r=lora_r, gradient_checkpointing=checkpointing)
        assert policy.is_gradient_checkpointing == checkpointing
        policy(TOKENS, labels=TOKENS).loss.backward()
        gradients.append({n: p.grad for n, p in policy.named_parameters() if p.requires_grad})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert any(gradient.any() for gradient in gradients[1].values())


# --- quantised bases ---

QUANTISED = [
    dict(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    dict(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False),
    dict(load_in_8bit=True),
]


def test_a_missing_bitsandbytes_is_one_sentence(model_id, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # what Python does for a module that cannot be imported
    with pytest.raises(ValueError, match=r"load_in_4bit needs bitsandbytes.*pip install plumbline\[quant\]"):
        build(model_id, load_in_4bit=True)


@pytest.mark.parametrize("settings", QUANTISED, ids=["nf4", "fp4", "int8"])
def test_quantised_bases_train_and_only_their_adapters_move(model_id, settings):
    pytest.importorskip("bitsandbytes")
    policy = build(model_id, **settings)
    frozen = {n: p.detach().clone() for n, p in policy.named_parameters() if not p.requires_grad}
    losses = train(policy, steps=6)
    assert losses[-1] < losses[0] - 0.5
    assert all(torch.equal(p, frozen[n]) for n, p in policy.named_parameters() if n in frozen)
    assert {p.dtype for p in policy.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("settings", QUANTISED, ids=["nf4", "fp4", "int8"])
def test_an_evaluation_between_steps_changes_nothing(model_id, settings):
    """On CPUs with AVX512-BF16 bitsandbytes would repack 4-bit weights in it: gradients wrong by 100 % afterwards."""
    pytest.importorskip("bitsandbytes")
    gradients = []
    for evaluates in (False, True):
        policy = build(model_id, **settings)
        train(policy, steps=2)
        if evaluates:
            logits(policy)
        policy(TOKENS, labels=TOKENS).loss.backward()
        gradients.append({n: p.grad for n, p in policy.named_parameters() if p.requires_grad})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize("settings", QUANTISED, ids=["nf4", "fp4", "int8"])
def test_training_and_evaluation_mode_see_the_same_quantised_model(model_id, settings):
    pytest.importorskip("bitsandbytes")
    policy = build(model_id, **settings)
    train(policy, steps=2)
    with torch.no_grad():
        in_training = policy(TOKENS).logits
    torch.testing.assert_close(logits(policy), in_training, rtol=0, atol=1e-5)


def test_four_bit_parameters_are_counted_unpacked(model_id):
    """Each packed byte holds two weights, so the count equals the plain model's and the bytes are fewer."""
    pytest.importorskip("bitsandbytes")
    plain, packed = (parameter_counts(build(model_id, load_in_4bit=four_bit)) for four_bit in (False, True))
    assert packed[:2] == plain[:2]
    assert packed[2] < plain[2]


def test_storage_dtype_is_float_for_fsdp(model_id):
    pytest.importorskip("bitsandbytes")
    config = ModelConfig(model_id=model_id, load_in_4bit=True)
    for for_fsdp, dtype in ((False, torch.uint8), (True, torch.float32)):
        policy = build_policy(config, seed=0, device="cpu", for_fsdp=for_fsdp)
        weights = [m.weight for m in policy.modules() if type(m).__name__ == "Linear4bit"]
        assert {weight.dtype for weight in weights if hasattr(weight, "quant_state")} == {dtype}
    with pytest.raises(ValueError, match="load_in_8bit cannot be sharded by fsdp"):
        build_policy(ModelConfig(model_id=model_id, load_in_8bit=True), seed=0, device="cpu", for_fsdp=True)


# --- the reference ---

REFERENCES = [
    (dict(lora_r=0), "copy"),
    (dict(), "base"),
    (dict(use_dora=True), "base"),
    (dict(modules_to_save="norm", lora_dropout=0.5), "base"),
]


@pytest.mark.parametrize(("settings", "kind"), REFERENCES, ids=["full", "lora", "dora", "saved"])
def test_the_reference_stays_where_training_started(model_id, settings, kind):
    policy = build(model_id, **settings)
    start = logits(build(model_id, lora_r=0))
    reference = build_reference(policy)
    assert reference.kind == kind
    train(policy)
    moved = logits(policy)
    assert (moved - start).abs().max() > 0.1
    next(p for p in policy.parameters() if p.requires_grad).requires_grad_(False)  # peft would switch it on again
    flags = [p.requires_grad for p in policy.parameters()]
    with reference.active() as model, torch.no_grad():
        assert torch.equal(model(TOKENS).logits, start)
    assert [p.requires_grad for p in policy.parameters()] == flags
    assert policy.training
    assert torch.equal(logits(policy), moved)


@pytest.mark.parametrize("settings", [dict(), dict(use_dora=True), dict(modules_to_save="lm_head")])
def test_the_reference_of_a_continued_adapter_is_the_starting_adapter(tmp_path, settings):
    """Not the bare base: the adapter it continues from. Its frozen copy is in no export."""
    base = save_model(tmp_path / "base", "llama-untied")
    first = build(base, **settings)
    train(first)
    export(first, tmp_path / "adapter", merge=False, model_id=base)

    policy = build(str(tmp_path / "adapter"))
    start = logits(policy)
    assert (start - logits(build(base, lora_r=0))).abs().max() > 0.1
    trainable = [name for name, p in policy.named_parameters() if p.requires_grad]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    reference = build_reference(policy)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random state moved"
    assert reference.kind == "adapter"
    assert [name for name, p in policy.named_parameters() if p.requires_grad] == trainable

    train(policy, steps=2)
    moved = logits(policy)
    assert (moved - start).abs().max() > 0.1
    with reference.active() as model, torch.no_grad():
        assert torch.equal(model(TOKENS).logits, start)
    assert [name for name, p in policy.named_parameters() if p.requires_grad] == trainable
    assert torch.equal(logits(policy), moved)
    train(policy, steps=1)
    with reference.active() as model, torch.no_grad():
        assert torch.equal(model(TOKENS).logits, start)

    export(policy, tmp_path / "second", merge=False, model_id=base)
    torch.testing.assert_close(logits(build(str(tmp_path / "second"))), logits(policy), rtol=0, atol=1e-5)
    with safe_open(tmp_path / "second" / "adapter_model.safetensors", framework="pt") as tensors:
        assert len(tensors.keys()) == len(trainable)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "gaussian", "orthogonal", "eva"])
def test_a_reference_leaves_the_policy_where_it_was(tmp_path, init):
    """Also beside an adapter whose initialisation changes the base weights: the copy must not do that once more."""
    from peft import LoraConfig, get_peft_model

    base = save_model(tmp_path / "base", "llama-untied")
    settings = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=init)
    first = get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    with torch.no_grad():
        for p in first.parameters():
            p.add_(0.01 if p.requires_grad else 0.0)
    first.save_pretrained(tmp_path / "adapter")

    policy = build(str(tmp_path / "adapter"))
    weights, start = {n: p.detach().clone() for n, p in policy.named_parameters()}, logits(policy)
    reference = build_reference(policy)
    assert reference.kind == "adapter"
    assert all(torch.equal(policy.get_parameter(name), weight) for name, weight in weights.items())
    assert torch.equal(logits(policy), start)
    with reference.active() as model:
        assert torch.equal(model(TOKENS).logits, start) and not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def test_gradients_survive_a_reference_pass_before_backward(model_id):
    """The reference is switched in between the policy's forward and its backward, as DPO does."""
    gradients = []
    for interrupted in (False, True):
        policy = build(model_id)
        reference = build_reference(policy)
        loss = policy(TOKENS, labels=TOKENS).loss
        if interrupted:
            with reference.active() as model, torch.no_grad():
                model(TOKENS)
        loss.backward()
        gradients.append([p.grad for p in policy.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# --- continuing an adapter ---


def test_a_continued_adapter_keeps_its_own_settings_and_says_so(tmp_path, model_id, caplog):
    first = build(model_id, lora_r=4, lora_alpha=8.0, lora_target_modules="q_proj")
    train(first)
    export(first, tmp_path / "adapter", merge=False, model_id=model_id)
    with caplog.at_level(logging.WARNING, logger="loops.shared.adapters"):
        policy = build(str(tmp_path / "adapter"), lora_r=32, lora_alpha=64.0)
    assert "lora_r 4 (not 32), lora_alpha 8 (not 64)" in caplog.text
    assert policy.peft_config[ADAPTER].r == 4
    assert len([p for p in policy.parameters() if p.requires_grad]) == 4
    assert torch.equal(logits(policy), logits(first))
    with pytest.raises(ValueError, match="lora_r 0 .* cannot continue"):
        build(str(tmp_path / "adapter"), lora_r=0)


def test_an_adapter_finds_its_base_beside_itself_and_from_the_working_directory(tmp_path, model_id, monkeypatch):
    export(build(model_id), tmp_path / "adapter", merge=False, model_id=model_id)
    file = tmp_path / "adapter" / "adapter_config.json"
    saved = json.loads(file.read_text())
    assert saved["base_model_name_or_path"] == str((tmp_path / "base").resolve())
    config = ModelConfig(model_id=str(tmp_path / "adapter"))
    monkeypatch.chdir(tmp_path)
    for written in ("../base", "base"):
        file.write_text(json.dumps({**saved, "base_model_name_or_path": written}))
        assert Path(find_source(config).base).resolve() == (tmp_path / "base").resolve()
    file.write_text(json.dumps({**saved, "base_model_name_or_path": "/gone/away/base"}))
    with pytest.raises(ValueError, match="model_id: there is no folder /gone"):
        build_policy(config, seed=0, device="cpu")
    file.write_text(json.dumps({**saved, "peft_type": "IA3", "base_model_name_or_path": "base"}))
    with pytest.raises(ValueError, match="only LORA can be continued"):
        build_policy(config, seed=0, device="cpu")


def test_an_adapter_without_tokenizer_uses_its_base_models(tmp_path, model_id):
    export(build(model_id), tmp_path / "adapter", merge=False, model_id=model_id)
    config = ModelConfig(model_id=str(tmp_path / "adapter"))
    assert build_tokenizer(config).chat_template == TEMPLATE
    for file in (tmp_path / "adapter").glob("*token*"):
        file.unlink()
    assert build_tokenizer(config).vocab_size == VOCABULARY


def test_an_adapter_of_another_base_is_refused(tmp_path, model_id):
    """peft only warns: the two tensors of the missing second layer would be dropped."""
    policy = build(model_id, lora_target_modules="q_proj")
    export(policy, tmp_path / "adapter", merge=False, model_id=model_id)
    save_model(tmp_path / "base", num_hidden_layers=1)
    with pytest.raises(ValueError, match="2 tensors of .*adapter_model.safetensors do not fit"):
        build(str(tmp_path / "adapter"))


def test_a_pickled_adapter_is_refused(tmp_path, model_id):
    export(build(model_id), tmp_path / "adapter", merge=False, model_id=model_id)
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(ValueError, match="pickled adapters are not read"):
        build(str(tmp_path / "adapter"))


def test_an_adapter_continues_on_a_quantised_base(tmp_path, model_id):
    pytest.importorskip("bitsandbytes")
    first = build(model_id, load_in_4bit=True)
    train(first)
    export(first, tmp_path / "adapter", merge=False, model_id=model_id)
    policy = build(str(tmp_path / "adapter"), load_in_4bit=True)
    assert torch.equal(logits(policy), logits(first))
    reference = build_reference(policy)
    train(policy, steps=1)
    with reference.active() as model, torch.no_grad():
        assert torch.equal(model(TOKENS).logits, logits(first))


# --- export ---

ADAPTERS = [
    dict(),
    dict(use_rslora=True, lora_target_modules=["q_proj", "down_proj"]),
    dict(use_dora=True),
    dict(modules_to_save="lm_head"),
    dict(lora_target_modules="q_proj,embed_tokens,lm_head"),
]


@pytest.mark.parametrize("settings", ADAPTERS, ids=["lora", "rslora", "dora", "saved", "embeddings"])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_a_merged_model_has_the_logits_of_its_adapter(tmp_path, any_model, settings):
    """Tied weights come apart when only one of them was adapted, and the config says so."""
    policy = build(any_model, **settings)
    train(policy)
    expected = logits(policy)
    export(policy, tmp_path / "merged", merge=True, model_id=any_model)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
    assert torch.equal(logits(policy), expected), "exporting changed the policy"
    tied = "untied" not in any_model and policy.config.tie_word_embeddings
    parted = "modules_to_save" in settings or "lm_head" in settings.get("lora_target_modules", "")
    assert merged.config.tie_word_embeddings == (tied and not parted)


@pytest.mark.parametrize("settings", ADAPTERS, ids=["lora", "rslora", "dora", "saved", "embeddings"])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_an_exported_adapter_gives_the_same_logits_in_plain_peft(tmp_path, any_model, settings):
    from peft import PeftModel

    policy = build(any_model, **settings)
    train(policy)
    export(policy, tmp_path / "adapter", merge=False, model_id=any_model)
    base = AutoModelForCausalLM.from_pretrained(any_model)
    reloaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(logits(reloaded), logits(policy))
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", framework="pt") as tensors:
        assert len(tensors.keys()) == len([p for p in policy.parameters() if p.requires_grad])


def test_an_exported_adapter_folder_loads_with_auto_model(tmp_path, any_model, monkeypatch):
    policy = build(any_model)
    train(policy)
    export(policy, tmp_path / "adapter", merge=False, model_id=any_model)
    monkeypatch.chdir(tmp_path / "adapter")  # from another place than training ran in
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")), logits(policy))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_a_fully_trained_model_is_exported_to_the_bit(tmp_path, any_model, dtype):
    policy = build(any_model, lora_r=0, torch_dtype=dtype)
    train(policy)
    files = export(policy, tmp_path / "full", merge=False, model_id=any_model)
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(files)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    assert reloaded.dtype == getattr(torch, dtype)
    assert torch.equal(logits(reloaded), logits(policy))
    assert AutoTokenizer.from_pretrained(tmp_path / "full").chat_template == TEMPLATE


@pytest.mark.parametrize("settings", [*QUANTISED, dict(load_in_4bit=True, use_dora=True)])
def test_merging_into_a_quantised_base_dequantises_it_first(tmp_path, model_id, settings):
    """Float32 compute: the merged model is the adapter model up to rounding.

    Merging into 4-bit weights would round the update away: measured on this project, an error of 4 in the logits.
    """
    pytest.importorskip("bitsandbytes")
    policy = build(model_id, **settings)
    train(policy)
    export(policy, tmp_path / "merged", merge=True, model_id=model_id)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(merged.config, "quantization_config")
    assert {type(m).__name__ for m in merged.modules() if "Linear" in type(m).__name__} == {"Linear"}
    torch.testing.assert_close(logits(merged), logits(policy), rtol=0, atol=1e-4)


def test_a_bfloat16_four_bit_merge_stays_within_its_rounding(tmp_path, model_id):
    """Rounding merged weights to bfloat16 (8 bits of mantissa) moves logits by hundredths, not by units."""
    pytest.importorskip("bitsandbytes")
    policy = build(model_id, load_in_4bit=True, torch_dtype="bfloat16")
    train(policy, steps=6)
    export(policy, tmp_path / "merged", merge=True, model_id=model_id)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.bfloat16
    difference = (logits(merged).float() - logits(policy).float()).abs().mean()
    assert difference < 0.03


@pytest.mark.parametrize("merge", [False, True])
def test_what_is_set_on_live_instances_does_not_reach_the_folder(tmp_path, model_id, merge):
    """A patched forward, a class made at run time and an attention name of our own must not be exported."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("a_name_of_ours", sdpa_attention_forward)
    for lora_r in (0, 4):
        policy = build(model_id, lora_r=lora_r)
        train(policy)
        expected = logits(policy)
        base = policy.get_base_model() if lora_r else policy
        base.set_attn_implementation("a_name_of_ours")
        base.__class__ = type("Qwen3ForCausalLM", (type(base),), {"__module__": type(base).__module__})
        base.forward = lambda *args, **kwargs: pytest.fail("the patched forward ran")
        folder = tmp_path / f"out{lora_r}"
        export(policy, folder, merge=merge, model_id=model_id)
        assert "a_name_of_ours" not in "".join(file.read_text() for file in folder.glob("*.json"))
        reloaded = AutoModelForCausalLM.from_pretrained(folder)
        torch.testing.assert_close(logits(reloaded), expected, rtol=0, atol=1e-5)


def test_exporting_leaves_the_random_state_alone(tmp_path, model_id):
    policy = build(model_id)
    torch.manual_seed(9)
    state = torch.get_rng_state()
    for merge in (False, True):
        export(policy, tmp_path / "out", merge=merge, model_id=model_id)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_adapter_is_exported_to_the_same_bytes_twice(tmp_path, model_id):
    policy = build(model_id)
    for folder in ("first", "second"):
        export(policy, tmp_path / folder, merge=False, model_id=model_id)
    names = json.loads((tmp_path / "first" / "adapter_config.json").read_text())["target_modules"]
    assert names == sorted(names)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


def test_mixture_of_experts_keep_their_checkpoint_names(tmp_path):
    """transformers fuses experts in memory; the folder must have the names that everyone else reads."""
    shape = dict(SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, decoder_sparse_step=1)
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape)).save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base", eos_token="<eos>")
    policy = build(str(tmp_path / "base"), lora_target_modules="q_proj,v_proj")
    train(policy)
    export(policy, tmp_path / "merged", merge=True, model_id=str(tmp_path / "base"))
    names = []
    for folder in ("base", "merged"):
        with safe_open(tmp_path / folder / "model.safetensors", framework="pt") as tensors:
            names.append(set(tensors.keys()))
    assert names[0] == names[1]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(policy), rtol=0, atol=1e-5)


EXPERTS = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
MOES = {
    "qwen3-moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig),
    "mixtral": (MixtralForCausalLM, MixtralConfig),
    "gpt-oss": (GptOssForCausalLM, GptOssConfig),  # [in, out], and only adapted when asked
}


def save_moe(folder: Path, kind: str = "qwen3-moe") -> str:
    model, config = MOES[kind]
    torch.manual_seed(0)
    model(config(**SHAPE, **EXPERTS, sliding_window=16)).save_pretrained(folder)
    save_tokenizer(folder, eos_token="<eos>")
    return str(folder)


def shake(model) -> None:
    """Moves everything that trains."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


@pytest.mark.parametrize("kind", ["qwen3-moe", "mixtral"])
def test_the_adapters_of_experts_and_routers_are_merged(tmp_path, kind):
    """all-linear reaches the fused experts, one wrapper inside another, and the router: the merged folder has them."""
    policy = build(save_moe(tmp_path / "base", kind))
    names = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
    assert any("experts.base_layer.lora_A" in name for name in names) and any("gate.lora_A" in name for name in names)
    before = logits(policy)
    shake(policy)
    expected = logits(policy)
    assert (expected - before).std() > 0.1
    export(policy, tmp_path / "merged", merge=True, model_id=str(tmp_path / "base"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-4)
    streamed = {name: tensor.clone() for name, tensor in iter_weights(policy)}
    for name, tensor in copy.deepcopy(policy).merge_and_unload().state_dict().items():
        torch.testing.assert_close(streamed[name], tensor, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", MOES)
def test_an_adapter_of_experts_can_be_continued_and_compared_with(tmp_path, kind):
    """What one run writes the next one reads: same logits, and the reference stays when the policy moves on."""
    base = save_moe(tmp_path / "base", kind)
    if kind == "gpt-oss":
        lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights=False)
        lora.target_parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        first = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    else:
        first = build(base)
        shake(first)
    export(first, tmp_path / "adapter", merge=False, model_id=base)
    second = build(str(tmp_path / "adapter"))
    assert torch.equal(logits(second), logits(first))
    reference = build_reference(second)
    train(second, steps=1)
    with reference.active() as model, torch.no_grad():
        assert torch.equal(model(TOKENS).logits, logits(first))
    assert not torch.equal(logits(second), logits(first))
    export(second, tmp_path / "merged", merge=True, model_id=base)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(second), rtol=0, atol=1e-4)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_experts_have_the_scale_that_was_asked_for(tmp_path, use_rslora):
    """gate and up are one tensor, for which peft takes twice the rank: the scale stays alpha/r, or alpha/sqrt(r)."""
    policy = build(save_moe(tmp_path / "base"), lora_r=4, lora_alpha=8, use_rslora=use_rslora)
    scales = {layer.scaling[ADAPTER] for layer in policy.modules() if hasattr(layer, "lora_A")}
    assert all(scale == pytest.approx(8 / 4**0.5 if use_rslora else 8 / 4) for scale in scales)
    shake(policy)
    export(policy, tmp_path / "adapter", merge=False, model_id=str(tmp_path / "base"))
    assert torch.equal(logits(build(str(tmp_path / "adapter"))), logits(policy))


def test_an_adapter_that_merging_does_not_know_is_refused_by_name(tmp_path, model_id):
    """aLoRA is active behind its invocation tokens only: no weight is the same for all tokens."""
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[5])
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(model_id), lora)
    with pytest.raises(ValueError, match="q_proj .ALoraLinearVariant. cannot be merged"):
        dict(iter_weights(policy))
    export(policy, tmp_path / "adapter", merge=False, model_id=model_id)
    assert build(str(tmp_path / "adapter"))
    with pytest.raises(ValueError, match="cannot be merged"):
        build(str(tmp_path / "adapter"), merge_weights=True)


def test_what_all_linear_cannot_adapt_is_left_out_and_told(tmp_path, caplog):
    """Llama-4's router gives back two tensors, and peft does not know its experts."""
    shape = dict(SHAPE, num_experts_per_tok=1, num_local_experts=2, intermediate_size_mlp=64, attention_chunk_size=16)
    torch.manual_seed(0)
    Llama4ForCausalLM(Llama4TextConfig(**shape)).save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base", eos_token="<eos>")
    with caplog.at_level(logging.WARNING, logger="loops"):
        policy = build(str(tmp_path / "base"))
    assert "all-linear adapts no experts.gate_up_proj, experts.down_proj, feed_forward.router" in caplog.text
    shake(policy)
    for merge in (False, True):
        export(policy, tmp_path / str(merge), merge=merge, model_id=str(tmp_path / "base"))
    assert torch.equal(logits(build(str(tmp_path / "False"))), logits(policy))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "True")
    torch.testing.assert_close(logits(merged), logits(policy), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="router is neither linear"):
        build(str(tmp_path / "base"), lora_target_modules="router")


def test_state_space_layers_are_adapted_where_an_adapter_gets_a_gradient(tmp_path):
    """Their fused kernels read the weights of the other projections themselves."""
    torch.manual_seed(0)
    MambaForCausalLM(
        MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, state_size=4)
    ).save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base", eos_token="<eos>")
    policy = build(str(tmp_path / "base"))
    adapted = {name.split(".lora_A")[0] for name, _ in policy.named_parameters() if ".lora_A" in name}
    assert {name.rsplit(".", 1)[1] for name in adapted} == {"in_proj"}
    with pytest.raises(ValueError, match="lora_target_modules out_proj, on Mamba.*: peft says: .*incompatible"):
        build(str(tmp_path / "base"), lora_target_modules="out_proj")


def test_pefts_refusals_are_one_sentence(tmp_path):
    """Experts have no place for dropout or DoRA."""
    base = save_moe(tmp_path / "base")
    for settings in (dict(lora_dropout=0.1), dict(use_dora=True)):
        with pytest.raises(ValueError, match="lora_target_modules all-linear, on Qwen3Moe.*: peft says: ") as error:
            build(base, **settings)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("settings", [dict(lora_r=0), dict(), dict(lora_target_modules="q_proj,v_proj")])
def test_text_trains_no_part_of_a_vision_model_that_it_never_reaches(tmp_path, settings, caplog):
    """Every trained parameter gets a gradient, which DDP needs; the export keeps what AutoProcessor reads."""
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    config = Gemma3Config(
        text_config=dict(SHAPE, query_pre_attn_scalar=16, sliding_window=16),
        vision_config=dict(vision, patch_size=14),
        mm_tokens_per_image=4,
        image_token_index=60,
        boi_token_index=61,
        eoi_token_index=62,
    )
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base", eos_token="<eos>")
    (tmp_path / "base" / "preprocessor_config.json").write_text("{}")
    with caplog.at_level(logging.WARNING, logger="loops"):
        policy = build(str(tmp_path / "base"), **settings)
    assert "model.vision_tower, model.multi_modal_projector stay as they are" in caplog.text
    policy(TOKENS % 60, labels=TOKENS % 60).loss.backward()
    trained = {name: parameter.grad for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert trained and all(grad is not None for grad in trained.values())
    assert "preprocessor_config.json" in export(policy, tmp_path / "out", merge=True, model_id=str(tmp_path / "base"))
    if settings:
        return
    shake(policy)
    export(policy, tmp_path / "adapter", merge=False, model_id=str(tmp_path / "base"))
    tokens = TOKENS % 60
    with torch.no_grad():
        assert torch.equal(build(str(tmp_path / "adapter")).eval()(tokens).logits, policy.eval()(tokens).logits)


def test_files_that_do_not_fit_together_are_one_sentence(tmp_path, model_id):
    """Sizes, layers, and git-lfs's pointers in place of files."""
    config = json.loads((tmp_path / "base" / "config.json").read_text())

    def change(**values) -> None:
        (tmp_path / "base" / "config.json").write_text(json.dumps(config | values))

    for lora_r in (0, 4):
        change(vocab_size=80)
        with pytest.raises(ValueError, match=r"embed_tokens.weight is \(64, 64\) in the weights .* \(80, 64\) by its"):
            build(model_id, lora_r=lora_r)
        change(num_hidden_layers=1, layer_types=["full_attention"])
        with pytest.raises(ValueError, match="more layers than its config.json, such as that of model.layers.1"):
            build(model_id, lora_r=lora_r)
    change(hidden_size="wide")
    with pytest.raises(ValueError, match="model_id: .* could not be loaded") as error:
        build(model_id)
    assert "\n" not in str(error.value)
    change()
    for name in ("model.safetensors", "tokenizer.json"):
        whole = (tmp_path / "base" / name).read_bytes()
        (tmp_path / "base" / name).write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
        )
        with pytest.raises(ValueError, match=f"model_id: .*{name} is a git-lfs pointer.*; run git lfs pull"):
            build_tokenizer(ModelConfig(model_id=model_id)) if name == "tokenizer.json" else build(model_id)
        (tmp_path / "base" / name).write_bytes(whole)


def test_an_adapters_own_patterns_are_not_run(tmp_path, model_id):
    """Names and ranks come from the tensors; a pattern that takes for ever, or a rank that is not there, is no help."""
    policy = build(model_id, lora_r=4, lora_target_modules="q_proj,down_proj")
    shake(policy)
    export(policy, tmp_path / "adapter", merge=False, model_id=model_id)
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    slow = "(([a-z0-9_]+\\.?)*)*!"
    for harmless in (dict(target_modules=slow), dict(target_modules=".*(q|down)_proj"), dict(exclude_modules=slow)):
        file.write_text(json.dumps(config | harmless))
        assert torch.equal(logits(build(str(tmp_path / "adapter"))), logits(policy))
    for bad in (
        dict(r=10**9),
        dict(r="four"),
        dict(rank_pattern={"q_proj": 10**9}),
        dict(alpha_pattern={slow: 8}),
        dict(r=2),
    ):
        file.write_text(json.dumps(config | bad))
        with pytest.raises(ValueError, match="model_id: .*adapter") as error:
            build(str(tmp_path / "adapter"))
        assert "\n" not in str(error.value)
    for broken in ("{", json.dumps(config | dict(peft_type="NONE")), json.dumps([])):
        file.write_text(broken)
        with pytest.raises(ValueError, match="model_id: .*adapter"):
            build(str(tmp_path / "adapter"))


def test_the_card_of_an_adapter_names_the_base_that_its_config_names(tmp_path, model_id, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export(build("base"), tmp_path / "adapter", merge=False, model_id="base", card={"base_model": "base"})
    named = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == model_id and f'base_model: "{named}"' in (tmp_path / "adapter" / "README.md").read_text()


def test_a_lora_run_shows_no_warnings_of_libraries(tmp_path, recwarn):
    build_reference(build(save_moe(tmp_path / "base")))
    assert not [str(warning.message) for warning in recwarn if "script_method" not in str(warning.message)]


def test_transposed_linear_layers_are_merged_too_and_without_a_warning(tmp_path, recwarn):
    """GPT-2 keeps its weights as [in, out]."""
    torch.manual_seed(0)
    shape = dict(vocab_size=VOCABULARY, n_positions=32, n_embd=32, n_layer=2, n_head=2, eos_token_id=1)
    GPT2LMHeadModel(GPT2Config(**shape, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).save_pretrained(
        tmp_path / "b"
    )
    save_tokenizer(tmp_path / "b", eos_token="<eos>")
    for use_dora in (False, True):
        policy = build(str(tmp_path / "b"), use_dora=use_dora)
        assert not [str(warning.message) for warning in recwarn if "fan_in" in str(warning.message)]
        train(policy)
        export(policy, tmp_path / "merged", merge=True, model_id=str(tmp_path / "b"))
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(logits(merged), logits(policy), rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", ADAPTERS[:4], ids=["lora", "rslora", "dora", "saved"])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_streamed_weights_are_those_of_merge_and_unload(any_model, settings):
    policy = build(any_model, **settings)
    train(policy)
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    streamed = {name: tensor.clone() for name, tensor in iter_weights(policy)}
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())
    merged = copy.deepcopy(policy).merge_and_unload().state_dict()
    assert set(merged) - set(streamed) <= {"lm_head.weight"} and set(streamed) <= set(merged)
    for name, tensor in streamed.items():
        torch.testing.assert_close(tensor, merged[name], rtol=0, atol=1e-6)
        assert not tensor.requires_grad


def test_streamed_weights_of_a_full_model_are_its_own(any_model):
    policy = build(any_model, lora_r=0)
    parameters = dict(policy.named_parameters())  # tied ones once
    streamed = dict(iter_weights(policy))
    assert streamed.keys() == parameters.keys()
    assert all(tensor.data_ptr() == parameters[name].data_ptr() for name, tensor in streamed.items())


@pytest.mark.parametrize("quantised", [{}, {"load_in_4bit": True}], ids=["plain", "4bit"])
def test_streamed_weights_without_the_adapter_are_the_bases(model_id, quantised):
    """Whatever the adapter holds, and under the same names as with it."""
    policy = build(model_id, **quantised)
    merged = {name: tensor.clone() for name, tensor in iter_weights(policy)}  # B is 0 so far: the base
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_" in name:
                parameter.fill_(torch.inf)
    base = dict(iter_weights(policy, adapter=False))
    assert list(base) == list(merged) and all(torch.equal(base[name], merged[name]) for name in base)
    assert not all(tensor.isfinite().all() for _, tensor in iter_weights(policy))


def test_the_model_card_tells_what_it_was_given(tmp_path, model_id):
    card = {
        "base_model": "org/model",
        "loop": "grpo",
        "dataset": "rows.jsonl",
        "command": "python loops/grpo.py --seed 1",
        "settings": {"learning_rate": 1e-5},
        "metrics": {"eval/accuracy": 0.9512345678},
        "versions": {"torch": torch.__version__},
    }
    export(build(model_id), tmp_path / "out", merge=False, model_id=model_id, card=card)
    text = (tmp_path / "out" / "README.md").read_text()
    assert text.startswith('---\nlibrary_name: peft\ntags: [plumbline]\nbase_model: "org/model"\n---\n')
    for piece in ("grpo", "rows.jsonl", "--seed 1", "`learning_rate` | 1e-05", "`eval/accuracy` | 0.951235"):
        assert piece in text


@pytest.mark.skipif(not STORIES.is_dir(), reason="../shared/models/stories260k is absent")
def test_stories260k_trains_and_comes_back(tmp_path):
    policy = build(str(STORIES), lora_r=4)
    tokens = build_tokenizer(ModelConfig(model_id=str(STORIES)))("Once upon a time", return_tensors="pt").input_ids
    policy(tokens, labels=tokens).loss.backward()
    train(policy)
    export(policy, tmp_path / "merged", merge=True, model_id=str(STORIES))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(policy), rtol=1e-5, atol=1e-5)
    assert merged.generation_config.eos_token_id == 2


def test_adapters_of_ddp_are_exported_from_the_model_inside(tmp_path, model_id):
    """One process over gloo: what DDP wraps is the same policy, and its export the same adapter."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        policy = build(model_id)
        wrapped = DistributedDataParallel(policy)
        train(wrapped)
        export(wrapped.module, tmp_path / "adapter", merge=False, model_id=model_id)
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(logits(build(str(tmp_path / "adapter"))), logits(policy))
