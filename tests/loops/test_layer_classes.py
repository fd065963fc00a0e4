"""The class of the decoder layers, found from the model: what sharding, and offloading, take as their unit."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from loops.shared.layers import layer_classes

LAYERS = 4
EXPECTED = {  # transformers' model type -> the class of its repeated block
    "llama": "LlamaDecoderLayer",
    "mistral": "MistralDecoderLayer",
    "mixtral": "MixtralDecoderLayer",
    "phi3": "Phi3DecoderLayer",
    "qwen2": "Qwen2DecoderLayer",
    "qwen3": "Qwen3DecoderLayer",
    "gemma": "GemmaDecoderLayer",
    "gemma2": "Gemma2DecoderLayer",
    "apertus": "ApertusDecoderLayer",
    "arcee": "ArceeDecoderLayer",
    "bamba": "BambaDecoderLayer",
    "bloom": "BloomBlock",
    "codegen": "CodeGenBlock",
    "cohere": "CohereDecoderLayer",
    "cohere2": "Cohere2DecoderLayer",
    "deepseek_v2": "DeepseekV2DecoderLayer",
    "deepseek_v3": "DeepseekV3DecoderLayer",
    "ernie4_5": "Ernie4_5DecoderLayer",
    "exaone4": "Exaone4DecoderLayer",
    "falcon": "FalconDecoderLayer",
    "gemma3_text": "Gemma3DecoderLayer",
    "glm": "GlmDecoderLayer",
    "glm4": "Glm4DecoderLayer",
    "gpt2": "GPT2Block",
    "gpt_bigcode": "GPTBigCodeBlock",
    "gpt_neox": "GPTNeoXLayer",
    "gpt_oss": "GptOssDecoderLayer",
    "gptj": "GPTJBlock",
    "granite": "GraniteDecoderLayer",
    "granitemoe": "GraniteMoeDecoderLayer",
    "helium": "HeliumDecoderLayer",
    "llama4_text": "Llama4TextDecoderLayer",
    "mamba2": "Mamba2Block",
    "mpt": "MptBlock",
    "olmo2": "Olmo2DecoderLayer",
    "olmoe": "OlmoeDecoderLayer",
    "opt": "OPTDecoderLayer",
    "persimmon": "PersimmonDecoderLayer",
    "phi": "PhiDecoderLayer",
    "qwen2_moe": "Qwen2MoeDecoderLayer",
    "qwen3_moe": "Qwen3MoeDecoderLayer",
    "smollm3": "SmolLM3DecoderLayer",
    "stablelm": "StableLmDecoderLayer",
    "starcoder2": "Starcoder2DecoderLayer",
}


def on_meta(model_type: str, layers: int = LAYERS) -> PreTrainedModel:
    """The architecture without a byte of weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, num_hidden_layers=layers))


def adapted(model: PreTrainedModel, dora: bool = False) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    with torch.device("meta"):
        return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", use_dora=dora))


@pytest.mark.parametrize("model_type", EXPECTED)
def test_the_unit_is_the_repeated_block(model_type: str) -> None:
    """Exactly one class, and as many modules of it as the model has layers: none twice, none inside another."""
    model = on_meta(model_type)
    assert layer_classes(model) == [EXPECTED[model_type]]
    assert len([module for module in model.modules() if type(module).__name__ == EXPECTED[model_type]]) == LAYERS


def test_the_issues_architectures_and_twenty_more_are_here() -> None:
    named = {"llama", "mistral", "mixtral", "phi3", "qwen2", "qwen3", "gemma", "gemma2"}
    assert named <= set(EXPECTED) and len(EXPECTED) >= len(named) + 20


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gemma2", "qwen3", "phi3", "gpt2", "opt"])
def test_adapters_around_and_inside_do_not_hide_it(model_type: str) -> None:
    assert layer_classes(adapted(on_meta(model_type))) == [EXPECTED[model_type]]


def test_two_kinds_of_layers_are_both_units() -> None:
    """One of Jamba's eight layers is attention, the others are Mamba: both classes, and nothing but layers."""
    model = on_meta("jamba", layers=8)
    names = layer_classes(model)
    assert names == ["JambaAttentionDecoderLayer", "JambaMambaDecoderLayer"]
    assert len([module for module in model.modules() if type(module).__name__ in names]) == 8


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_declared_class_that_is_absent_is_left_out(wrapped: bool) -> None:
    """Text-only models declare the vision blocks of their siblings; accelerate's own search would stop there."""
    model = on_meta("qwen3")
    model._no_split_modules = ["Qwen3VisionBlock", "Qwen3DecoderLayer"]
    assert layer_classes(adapted(model) if wrapped else model) == ["Qwen3DecoderLayer"]


@pytest.mark.parametrize("declared", [None, [], ["Qwen3VisionBlock"]])
@pytest.mark.parametrize("model_type", ["qwen3", "qwen3_moe", "gpt2"])
def test_without_a_declaration_it_is_the_block_of_the_largest_list(declared: list[str] | None, model_type: str) -> None:
    model = on_meta(model_type)
    model._no_split_modules = declared
    assert layer_classes(adapted(model)) == [EXPECTED[model_type]]


def test_experts_are_not_taken_for_layers() -> None:
    """A list of 8 experts in each of 2 layers: the layers' list holds them all, and is the larger one."""

    class Expert(nn.Linear):
        pass

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([Expert(4, 4) for _ in range(8)])

    assert layer_classes(nn.Sequential(nn.Embedding(9, 4), nn.ModuleList([Block(), Block()]))) == ["Block"]


def test_a_model_without_repeated_blocks_has_none() -> None:
    assert layer_classes(nn.Linear(2, 2)) == []


def test_packing_and_offloading_do_not_hide_it() -> None:
    """Both put a subclass in the place of a class."""
    from loops.shared.layers import offload_activations
    from loops.shared.policy import enable_packing

    model = adapted(on_meta("llama"))
    offload_activations(model)
    enable_packing(model)
    assert layer_classes(model) == ["LlamaDecoderLayer"]
