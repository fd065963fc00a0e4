"""Whole named tensors of a sharded, quantised or adapted model, and its export as a Hugging Face folder."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loops.shared.adapters import ADAPTER, adapted_name, disable_bnb_eval_kernels, quiet_peft, refuse_unmergeable
from loops.shared.layers import LOGITS_TOLERANCE, WRAPPERS, base_model, plain_name, reshard
from loops.shared.models import ModelConfig, resolve_dtype

if TYPE_CHECKING:
    from accelerate import Accelerator
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_MAX_SHARD_SIZE = "5GB"
SHAPE_COMPARED = (2, 16)  # sequences and tokens of the comparison
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
_CARD_SECTIONS = ("base_model", "loop", "dataset", "command", "settings", "metrics", "versions")


def iter_weights(
    model: nn.Module, *, dtype: torch.dtype | None = None, adapter: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors, unsharded, one at a time, under the names of the plain transformers model.

    Adapters are merged on the fly, W + scaling * B A (DoRA: rescaled to the learned row norms), or left out where
    `adapter` is False. Quantised weights are dequantised first; the sum is formed in at least float32 and rounded once,
    to `dtype` (default: the base's). Tied weights come once; buffers keep their dtype. Tensors may share memory with
    the model: copy what outlives the next step.

    Every rank has to run the whole iteration: all ranks gather each sharded tensor. Names are those of the model in
    memory; an architecture whose experts transformers fuses has other names in files.

    Raises ValueError: there is an adapter that merging does not know.
    """
    from peft.tuners.lora import LoraLayer

    if adapter:
        refuse_unmergeable(model)
    reshard(model)
    base = base_model(model)
    seen: set[int] = set()
    for name, owner, tensor, rounded in _walk(base, ""):
        if isinstance(owner, LoraLayer):
            whole = _merged(owner, tensor, dtype) if adapter else _plain(owner.get_base_layer(), tensor)
        elif id(tensor) in seen:
            continue
        else:
            seen.add(id(tensor))
            whole = _plain(owner, tensor)
        if type(tensor).__name__ == "Int8Params":
            rounded = base.config.dtype  # 8-bit weights do not keep the dtype they were read in, 4-bit ones do
        if dtype is not None and isinstance(tensor, nn.Parameter) and whole.is_floating_point():
            rounded = dtype
        yield name, whole if rounded is None else whole.to(rounded)


def export_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    merge: bool,
    card: Mapping[str, Any],
    title: str | None = None,
    dtype: torch.dtype | None = None,
) -> list[Path]:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` loads, and return its files.

    A full model, or a LoRA policy with `merge`, becomes a plain model (of a quantised base: dequantised, then merged;
    merging into the 4-bit weights would round the update away). Otherwise only the adapter is written, with its base
    named in adapter_config.json (a folder by its absolute path). Beside it go the tokenizer with its chat
    template, the generation config and a model card.

    The weights go through a plain copy built from class and config, so nothing that was set on the live instances
    (a patched forward, an attention implementation, FSDP's classes) reaches the folder.

    Args:
        model: the unwrapped policy. Every rank calls this; only rank 0 writes, the others return [].
        card: what the model card says, any of `base_model`, `loop`, `dataset`, `command` (text) and `settings`,
            `metrics`, `versions` (mappings); `{}` leaves the card at its title.
        title: of the model card; None is the folder's name.
        dtype: of what is written; None keeps the base's (of an adapter: its own).
    """
    from peft import PeftModel

    folder = Path(folder)
    adapter_only = isinstance(model, PeftModel) and not merge
    base = base_model(model)
    tensors = trained_tensors(model, dtype) if adapter_only else iter_weights(model, dtype=dtype)
    writes = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    written = {name: tensor.cpu() for name, tensor in tensors if writes}
    if not writes:
        return []

    folder.mkdir(parents=True, exist_ok=True)
    if adapter_only:
        _write_adapter(model, written, folder)
    else:
        _plain_copy(model, written).save_pretrained(folder, max_shard_size=_MAX_SHARD_SIZE)
    tokenizer.save_pretrained(folder)
    _copy_processor(base, folder)
    if card.get("base_model") and Path(card["base_model"]).expanduser().is_dir():
        card = {**card, "base_model": _absolute(base.name_or_path if adapter_only else card["base_model"])}
    (folder / "README.md").write_text(model_card(title or folder.resolve().name, adapter_only, card), encoding="utf-8")
    return sorted(path for path in folder.iterdir() if path.is_file())


def _absolute(source: str) -> str:
    """A folder by its absolute path; a hub id as it is."""
    folder = Path(source).expanduser()
    return str(folder.resolve()) if folder.is_dir() else str(source)


def _copy_processor(base: Any, folder: Path) -> None:
    """Copy what AutoProcessor reads besides the tokenizer, for models that take more than text."""
    from transformers.utils import cached_file

    if base.config.get_text_config() is base.config:
        return
    for name in _PROCESSOR_FILES:
        found = cached_file(
            base.name_or_path,
            name,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if found is not None:
            shutil.copyfile(found, folder / name)


class WrongLogits(RuntimeError):
    """The exported model does not give the trained one's logits."""


def reload_folder(folder: Path, model: ModelConfig, quantisation: Any) -> nn.Module:
    """The written folder as its users load it, on the CPU: plain transformers, or peft on the base as it was trained.

    model: with the dtype of training; quantisation: of the adapter's base, as transformers takes it.
    """
    from transformers import AutoModelForCausalLM

    trust, settings_file = model.trust_remote_code, folder / "adapter_config.json"
    if not settings_file.is_file():
        return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust).eval()
    from peft import PeftModel

    settings = json.loads(settings_file.read_text())
    base = AutoModelForCausalLM.from_pretrained(
        settings["base_model_name_or_path"],
        revision=settings.get("revision"),
        dtype=resolve_dtype(model, "cpu"),
        quantization_config=quantisation,
        trust_remote_code=trust,
    )
    with quiet_peft(f"{folder}"):
        reloaded = PeftModel.from_pretrained(base, str(folder)).eval()
    disable_bnb_eval_kernels(reloaded)
    return reloaded


def logits_of(model: Any, device: torch.device | str | None = None) -> Tensor:
    """Logits of a few random tokens, the same for every model of one vocabulary; [B, T, V] in at least float32.

    In evaluation mode, on the CPU afterwards. Every rank calls it. device: of the inputs; None is the model's.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(0, vocabulary, SHAPE_COMPARED, generator=torch.Generator().manual_seed(0))
    was_training = model.training
    model.eval()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        logits = model(tokens.to(device or next(model.parameters()).device)).logits.cpu()
    model.train(was_training)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def coarsest_dtype(model: nn.Module, *others: torch.dtype | None) -> torch.dtype:
    """The dtype on the way to a model's logits that decides how far those of its export may differ."""
    parameters = list(model.parameters())
    dtypes = {tensor.dtype for tensor in parameters if tensor.dtype in LOGITS_TOLERANCE}
    dtypes |= {other for other in others if other}
    dtypes |= {dtype for m in model.modules() if isinstance(dtype := getattr(m, "compute_dtype", None), torch.dtype)}
    if parameters[0].device.type != "cpu":
        dtypes.add(torch.float16)  # TF32, which CUDA's convolutions take, has its digits
    return max(dtypes, key=LOGITS_TOLERANCE.__getitem__)


def compare_logits(expected: Tensor, found: Tensor, limit: float, dtype: torch.dtype) -> str:
    """The sentence that says how far two models' logits [B, T, V] differ.

    Raises WrongLogits: further than `limit`, as a root mean square over the standard deviation of `expected`.
    """
    difference = found - expected
    error = float(difference.square().mean().sqrt() / expected.std())
    words = str(dtype).removeprefix("torch.")
    sentence = (
        f"logits of {expected.shape[0] * expected.shape[1]} tokens: root mean square difference {error:.2g} of their "
        f"spread (limit {limit:g} for {words}), largest {float(difference.abs().max()):.2g}"
    )
    if not error <= limit:  # NaN is no agreement either
        raise WrongLogits(f"the reloaded model is not the trained one: {sentence}")
    return sentence


def check_export(
    model: nn.Module, folder: Path, expected: Tensor, config: ModelConfig, accelerator: Accelerator
) -> str | None:
    """Compare a run's written folder with its policy; the reason where that is not possible, else None.

    Raises WrongLogits: the folder, loaded afresh on the CPU, does not give the `expected` logits.
    """
    base = base_model(model)
    if accelerator.device.type != "cpu" and getattr(base, "is_quantized", False) and not config.load_in_4bit:
        return "a CPU rounds the products of its quantised base otherwise"
    dtype = resolve_dtype(config, accelerator.device)
    autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    coarsest = coarsest_dtype(model, autocast)
    trained = replace(config, torch_dtype=str(dtype).removeprefix("torch."))
    found = logits_of(reload_folder(folder, trained, getattr(base.config, "quantization_config", None)))
    try:
        compare_logits(expected, found, LOGITS_TOLERANCE[coarsest], coarsest)
    except WrongLogits as error:
        raise WrongLogits(f"{error}; what was written is left in {folder}.") from None
    return None


def model_card(title: str, adapter_only: bool, card: Mapping[str, Any]) -> str:
    """README.md of an exported folder; see `export_model` for `card`."""
    head = ["---", f"library_name: {'peft' if adapter_only else 'transformers'}", "tags: [plumbline]"]
    if card.get("base_model"):
        head.append(f"base_model: {json.dumps(str(card['base_model']))}")  # a JSON string is a YAML string
    lines = [*head, "---", "", f"# {title}", ""]
    kind = "A LoRA adapter" if adapter_only else "A model"
    lines += [f"{kind} trained with Plumbline.", ""]
    for section in _CARD_SECTIONS:
        value = card.get(section)
        if not value:
            continue
        heading = section.replace("_", " ").capitalize()
        if isinstance(value, Mapping):
            lines += [f"## {heading}", "", "| | |", "|---|---|"]
            lines += [f"| `{key}` | {_cell(entry)} |" for key, entry in value.items()]
        elif section == "command":
            lines += [f"## {heading}", "", "```", str(value), "```"]
        else:
            lines += [f"**{heading}**: {value}"]
        lines.append("")
    return "\n".join(lines)


def _cell(entry: Any) -> str:
    """A value as a cell of a Markdown table."""
    text = f"{entry:.6g}" if isinstance(entry, float) else str(entry)
    return text.replace("|", "\\|").replace("\n", " ")


def _walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module, Tensor, torch.dtype | None]]:
    """(plain name, owner, tensor, dtype to round to) of all that a checkpoint holds.

    A LoRA layer owns the weight it adapts; around another LoRA layer (fused experts have two weights) only its own. A
    dtype of None keeps the tensor's; only `modules_to_save` have another, since they are trained in float32.
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    if isinstance(module, ModulesToSaveWrapper):
        originals = _walk(module.original_module, prefix)
        for (name, owner, tensor, _), original in zip(
            _walk(module.modules_to_save[ADAPTER], prefix), originals, strict=True
        ):
            yield name, owner, tensor, original[2].dtype
    elif isinstance(module, LoraLayer):
        own: Any = module
        for name, owner, tensor, dtype in _walk(own.base_layer, prefix):
            yield name, module if name == f"{prefix}{adapted_name(module)}" else owner, tensor, dtype
    else:
        for name, parameter in module.named_parameters(recurse=False):
            yield f"{prefix}{name}", module, parameter, None
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}{name}", module, buffer, None
        for name, child in module.named_children():
            yield from _walk(child, prefix if name in WRAPPERS else f"{prefix}{name}.")


def _plain(owner: nn.Module, tensor: Tensor) -> Tensor:
    """A whole tensor of ordinary numbers: gathered, and dequantised when bitsandbytes holds it."""
    # Read before gathering: a gathered tensor lacks what bitsandbytes attached to the parameter.
    quant_state = getattr(owner, "quant_state", None) or getattr(tensor, "quant_state", None)
    is_8bit = type(tensor).__name__ == "Int8Params"
    whole = _whole(tensor)
    if quant_state is not None and owner.weight is tensor:
        from bitsandbytes.functional import dequantize_4bit

        # offloaded shards are on the host, their constants on the GPU
        return dequantize_4bit(whole.to(quant_state.absmax.device).reshape(-1, 1), quant_state)
    if is_8bit:
        state: Any = owner.state
        scale = state.SCB if state.SCB is not None else tensor.SCB  # type: ignore[attr-defined]  # moves on first use
        return whole.float() * scale.view(-1, 1) / 127.0  # row maxima map to 127
    return whole


def _merged(layer: Any, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The weight of a LoRA layer with its adapter added; W + scaling * B A, rows rescaled to the magnitudes of DoRA.

    Rounded to `dtype`, or with None to the base's.
    """
    weight = _plain(layer.get_base_layer(), tensor)
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if ADAPTER in layer.lora_embedding_A:
        a, b = _whole(layer.lora_embedding_A[ADAPTER]), _whole(layer.lora_embedding_B[ADAPTER])
        delta = (b @ a).T  # [V, H]
    else:
        a, b = _whole(layer.lora_A[ADAPTER].weight), _whole(layer.lora_B[ADAPTER].weight)
        if getattr(layer, "num_experts", 1) > 1:  # peft's layout: A [E * r, in], B [out, r * E]
            a, b = a.reshape(layer.num_experts, -1, a.shape[1]), b.reshape(b.shape[0], -1, layer.num_experts)
            delta = torch.einsum("ore,eri->eoi", b, a)
            delta = delta if layer._did_swap_in_out_features else delta.mT  # as the base keeps its experts
        else:
            delta = b @ a  # [out, in]
    merged = exact.T if layer.fan_in_fan_out else exact
    merged = merged + delta * layer.scaling[ADAPTER]
    if layer.use_dora.get(ADAPTER):
        magnitude = _whole(layer.lora_magnitude_vector[ADAPTER].weight)  # [out]
        merged = merged * (magnitude / merged.norm(dim=1)).unsqueeze(1)
    return (merged.T if layer.fan_in_fan_out else merged).to(dtype or weight.dtype)


def _whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or a shard's whole tensor, gathered by all ranks."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def trained_tensors(model: nn.Module, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """The trained tensors, unsharded, under peft's names, in `dtype` (None: their own)."""
    reshard(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensor = _whole(parameter)
            yield plain_name(name), tensor if dtype is None else tensor.to(dtype)


def plain_class(model: nn.Module) -> Any:
    """The class that can be imported, behind those that FSDP and the packed forward put in front of it at run time."""
    from transformers import PreTrainedModel

    return next(
        cls
        for cls in type(model).__mro__
        if issubclass(cls, PreTrainedModel) and getattr(sys.modules[cls.__module__], cls.__name__, None) is cls
    )


def _plain_copy(model: PreTrainedModel | PeftModel, weights: Mapping[str, Tensor] | None = None) -> PreTrainedModel:
    """The same architecture rebuilt without wrappers, on the meta device or holding `weights`.

    An adapter on one end of tied weights unties them: the copy is then built untied, and its config says so.
    """

    base = base_model(model)
    config = copy.deepcopy(base.config)
    config._attn_implementation = "eager"  # the copy never runs, so it must not ask for a kernel
    if hasattr(config, "quantization_config"):
        del config.quantization_config

    def build() -> Any:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return plain_class(base)(config)

    plain = build()
    if weights is not None:
        tied = set(plain.all_tied_weights_keys)
        if tied & set(weights):
            config.tie_word_embeddings = False
            plain = build()
        report = plain.load_state_dict(weights, strict=False, assign=True)
        assert not report.unexpected_keys and set(report.missing_keys) <= tied, report
        plain.tie_weights()
    plain.generation_config = copy.deepcopy(base.generation_config)
    plain.name_or_path = base.name_or_path
    return plain


def _write_adapter(model: Any, trained: Mapping[str, Tensor], folder: Path) -> None:
    """adapter_model.safetensors and adapter_config.json as peft writes them, whatever wraps the live model."""
    from peft import get_peft_model, get_peft_model_state_dict
    from safetensors.torch import save_file

    config = copy.deepcopy(model.peft_config[ADAPTER])
    base = _plain_copy(model)
    with torch.random.fork_rng(devices=[]), torch.device("meta"), quiet_peft("export"):
        plain = get_peft_model(base, copy.deepcopy(config), adapter_name=ADAPTER)
    adapter = get_peft_model_state_dict(
        plain, state_dict=dict(trained), adapter_name=ADAPTER, save_embedding_layers=False
    )
    assert len(adapter) == len(trained), f"{len(trained)} tensors are trained, but {len(adapter)} would be saved"
    save_file(
        {name: tensor.contiguous() for name, tensor in adapter.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    config.base_model_name_or_path = _absolute(base.name_or_path)
    config.inference_mode = True
    for key in ("target_modules", "target_parameters", "modules_to_save"):  # sets: sorted, for one file in all runs
        if isinstance(getattr(config, key), (set, list)):
            setattr(config, key, sorted(getattr(config, key)))
    config.save_pretrained(str(folder))
    base.generation_config.save_pretrained(folder)
