"""LoRA and its relatives on a frozen base: a fresh adapter, one continued from a folder, and the checks of both."""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from loops.shared.layers import parameter_counts
from loops.shared.tracking import first_line

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

ADAPTER = "default"  # peft's own name for the one adapter that is trained, saved and merged
REFERENCE_ADAPTER = "reference"  # the frozen copy of an adapter that training continues from

# Parts of a LoRA adapter made elsewhere that train something other than the low-rank pair of a weight: merging and the
# reference would not account for them.
_FOREIGN_LORA = ("trainable_token_indices", "layer_replication", "lora_bias")
_MERGEABLE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_MERGEABLE_LAYERS = ("Linear", "Embedding", "ParamWrapper", "Linear4bit", "Linear8bitLt")  # peft's own, no others
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # values of its max_lora_rank


def served_rank(rank: int) -> int:
    """The smallest `max_lora_rank` of vLLM that this rank fits into. Raises ValueError above the largest."""
    if rank > VLLM_RANKS[-1]:
        raise ValueError(
            f"the adapter's rank is {rank} and vLLM serves {VLLM_RANKS[-1]} at most: merge it into its base."
        )
    return next(served for served in VLLM_RANKS if served >= rank)


class SavedAdapter(NamedTuple):
    """An adapter as it was read from a folder."""

    folder: Path
    config: Any  # peft's
    tensors: dict[str, Tensor]


def add_adapter(base: PreTrainedModel, lora: LoraConfig, *, merge: bool) -> PeftModel:
    """A fresh adapter on a base, which it freezes.

    merge: the export will be merged. Raises ValueError for modules that are not there, or take no adapter.
    """
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer

    targets: Any = lora.target_modules
    everything = targets == "all-linear"
    _check_modules_exist(base, "lora_target_modules", [] if everything else sorted(targets))
    _check_modules_exist(base, "modules_to_save", lora.modules_to_save or [])
    lora.exclude_modules = _excluded(base, everything=everything)
    names = "all-linear" if everything else ", ".join(targets)
    with quiet_peft(f"lora_target_modules {names}, on {type(base).__name__}"):
        policy: Any = get_peft_model(base, lora, adapter_name=ADAPTER)
    if lora.use_rslora:  # peft doubles rank and alpha where it fuses two of a layer's weights: right for alpha/r only
        lora = policy.peft_config[ADAPTER]
        for key, rank in lora.rank_pattern.items():
            lora.alpha_pattern[key] = lora.lora_alpha * math.sqrt(rank / lora.r)  # type: ignore[assignment]
        for layer in policy.modules():
            if isinstance(layer, LoraLayer) and layer.r[ADAPTER] != lora.r:
                layer.lora_alpha[ADAPTER] = lora.lora_alpha * math.sqrt(layer.r[ADAPTER] / lora.r)
                layer.set_scale(ADAPTER, 1.0)
    _check_layers(policy, merge=merge)
    upcast_modules_to_save(policy)
    if everything:
        _warn_of_unadapted(policy)
    return policy


def continue_adapter(base: PreTrainedModel, adapter: SavedAdapter, lora: LoraConfig, *, merge: bool) -> PeftModel:
    """A saved adapter, trainable. Its own settings win; where `lora` has others, the difference is logged."""
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    folder, saved, tensors = adapter
    if saved.peft_type != "LORA":
        raise ValueError(f"model_id: {folder} is an adapter of type {saved.peft_type}; only LORA can be continued.")
    foreign = [name for name in _FOREIGN_LORA if getattr(saved, name, None)]
    foreign += ["bias"] if saved.bias != "none" else []
    if foreign:
        raise ValueError(f"model_id: {folder}/adapter_config.json sets {foreign[0]}, which cannot be continued.")
    _trust_the_tensors(saved, tensors, base, folder)
    if isinstance(saved.target_modules, (list, set)):
        _check_modules_exist(base, f"{folder}/adapter_config.json: target_modules", sorted(saved.target_modules))
    keys = {"r": "lora_r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "use_dora": "use_dora"}
    differing = [
        f"{ours} {getattr(saved, key)} (not {getattr(lora, key)})"
        for key, ours in {**keys, "use_rslora": "use_rslora"}.items()
        if getattr(saved, key) != getattr(lora, key)
    ]
    if differing:
        logger.warning("continuing the adapter %s with its own %s", folder, ", ".join(differing))

    saved.inference_mode = False
    with quiet_peft(f"model_id: the adapter {folder}"):
        policy: Any = get_peft_model(base, saved, adapter_name=ADAPTER)
    _check_layers(policy, merge=merge)
    upcast_modules_to_save(policy)  # before the weights are read, which would be rounded otherwise
    # peft would only warn about tensors that found no place, and leave the others random.
    expected = get_peft_model_state_dict(policy, adapter_name=ADAPTER, save_embedding_layers=False)
    odd = set(tensors) ^ set(expected)
    odd |= {name for name in set(tensors) & set(expected) if tensors[name].shape != expected[name].shape}
    if odd:
        raise ValueError(
            f"model_id: {len(odd)} tensors of {folder}/adapter_model.safetensors do not fit its base model, such as "
            f"{min(odd)}; correct base_model_name_or_path in adapter_config.json."
        )
    set_peft_model_state_dict(policy, tensors, adapter_name=ADAPTER)
    return policy


def _trust_the_tensors(saved: Any, tensors: dict[str, Tensor], base: nn.Module, folder: Path) -> None:
    """Take names and ranks from the tensors where the adapter's config has patterns (may be slow) or wrong ranks."""
    file = folder / "adapter_config.json"
    rank = max((tensor.shape[0] for name, tensor in tensors.items() if "_A." in f"{name}."), default=0)
    ranks, alphas = saved.rank_pattern or {}, saved.alpha_pattern or {}
    if not isinstance(saved.r, int) or (saved.r > rank and not ranks):
        raise ValueError(f"model_id: {file} has r {saved.r}, and {rank} is the rank of its tensors; correct r.")
    saved.r = min(saved.r, rank)  # of modules that are not in rank_pattern
    for key, largest in ranks.items():
        if largest > rank:
            raise ValueError(f"model_id: {file} has rank {largest} for {key}, and {rank} is the rank of its tensors.")
    for key in (*ranks, *alphas):
        if re.search(r"\)[*+?{]", key) or len(re.findall(r"[*+{]", key)) > 3:
            raise ValueError(f"model_id: {file} has the pattern {key} for ranks or alphas; write plain module names.")
    if not any(isinstance(names, str) for names in (saved.target_modules, saved.exclude_modules)):
        if not saved.layers_pattern:
            return
    parameters = tuple(f".{name}" for name in saved.target_parameters or ())
    modules = dict(base.named_modules())
    named = {name.split(".lora_")[0].removeprefix("base_model.model.") for name in tensors if ".lora_" in name}
    saved.target_modules = {
        name
        for name in named
        if not parameters or (hasattr(modules.get(name), "weight") and not f".{name}.weight".endswith(parameters))
    }
    saved.exclude_modules = saved.layers_to_transform = saved.layers_pattern = None


def _check_modules_exist(base: nn.Module, key: str, names: list[str]) -> None:
    """Raise ValueError for a name that ends no module's path: peft would skip it without a word."""
    modules = {f".{path}": module for path, module in base.named_modules()}
    unknown = [name for name in names if not any(path.endswith(f".{name}") for path in modules)]
    if unknown:
        weighted = [path for path, module in modules.items() if getattr(module, "weight", None) is not None]
        existing = list(dict.fromkeys(path.rsplit(".", 1)[-1] for path in weighted))
        raise ValueError(
            f"{key}: no module of {type(base).__name__} is called {', '.join(unknown[:3])}; there are, for instance, "
            f"{', '.join(existing[:12])}."
        )


def _check_layers(policy: PeftModel, *, merge: bool) -> None:
    """Every adapter must be on a linear layer, on experts, or (without DoRA) on an embedding; and known to `merge`."""
    from peft.tuners.lora import LoraLayer

    layers = [(path, module) for path, module in policy.named_modules() if isinstance(module, LoraLayer)]
    if not layers:
        raise ValueError("lora_target_modules: no module of the model takes an adapter; name its linear layers.")
    for path, layer in layers:
        linear = ADAPTER in layer.lora_A and layer.lora_A[ADAPTER].weight.ndim == 2
        linear = linear and not _is_own_linear(layer.get_base_layer())
        if not linear and ADAPTER not in layer.lora_embedding_A:
            raise ValueError(f"lora_target_modules: {path} is neither linear nor an embedding; leave it out.")
        if not linear and layer.use_dora.get(ADAPTER):
            raise ValueError(f"lora_target_modules: {path} is an embedding, which use_dora does not cover; drop one.")
    if merge:
        refuse_unmergeable(policy)


def adapted_name(layer: Any) -> str:
    """The name that the weight of a LoRA layer has in its module; `weight` but for the experts of a MoE."""
    return getattr(layer, "parameter_name", "weight")


def refuse_unmergeable(policy: nn.Module) -> None:
    """Raise ValueError for an adapter that is not W + scaling * B A (or DoRA) on ordinary or bitsandbytes' weights."""
    from peft.tuners.lora import LoraLayer

    for path, layer in policy.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        kind = type(layer).__name__.removeprefix("FSDP")
        variant = layer.lora_variant.get(ADAPTER)
        weight = getattr(layer.get_base_layer(), adapted_name(layer), None)
        numbers = getattr(weight, "dtype", None) in _MERGEABLE_DTYPES
        if kind in _MERGEABLE_LAYERS and (numbers or type(weight).__name__ in ("Params4bit", "Int8Params")):
            if variant is None or type(variant).__name__.startswith("Dora"):
                continue
            kind = type(variant).__name__
        raise ValueError(
            f"lora_target_modules: the adapter of {path} ({kind}) cannot be merged into its weights; leave that "
            "module out, or set merge_weights: false."
        )


def upcast_modules_to_save(policy: PeftModel) -> None:
    """Give `modules_to_save` at least float32, as peft does for adapters only; the model around them keeps its dtype.

    Inputs are cast on the way in, and outputs back on the way out, except those of the head: logits stay float32.
    """
    from peft.utils import ModulesToSaveWrapper

    base: Any = policy.get_base_model()
    head = base.get_output_embeddings()
    for wrapper in policy.modules():
        if not isinstance(wrapper, ModulesToSaveWrapper):
            continue
        for module in wrapper.modules_to_save.values():
            narrow = [p for p in module.parameters() if p.dtype in (torch.bfloat16, torch.float16)]
            if not narrow:
                continue
            outer = narrow[0].dtype
            for parameter in narrow:
                parameter.data = parameter.data.float()
            module.register_forward_pre_hook(_cast_inputs)
            if wrapper is not head:
                module.register_forward_hook(partial(_cast_output, dtype=outer))


def _cast_inputs(module: nn.Module, inputs: tuple) -> tuple:
    dtype = next(module.parameters()).dtype  # read now: FSDP computes in another one than it stores
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)


def _cast_output(module: nn.Module, inputs: tuple, output: Any, *, dtype: torch.dtype) -> Any:
    return output.to(dtype) if isinstance(output, Tensor) else output


def changes_nothing(policy: PeftModel) -> bool:
    """Whether the adapter is still the identity: B (or an embedding's A) zero, saved modules equal to the originals."""
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    for module in policy.modules():
        if isinstance(module, LoraLayer):
            zeros: Any = [module.lora_B[ADAPTER].weight] if ADAPTER in module.lora_B else []
            zeros += [module.lora_embedding_A[ADAPTER]] if ADAPTER in module.lora_embedding_A else []
            if any(bool(tensor.any()) for tensor in zeros):
                return False
        elif isinstance(module, ModulesToSaveWrapper):
            pair: Any = (module.original_module, module.modules_to_save[ADAPTER])
            for original, trained in zip(pair[0].parameters(), pair[1].parameters(), strict=True):
                if not torch.equal(original.to(trained.dtype), trained):
                    return False
    return True


def modules_without_text(base: Any) -> list[str]:
    """Modules of a vision or audio model that text never reaches: neither in its decoder nor at one of its ends."""
    if base.config.get_text_config() is base.config:
        return []
    ends = (base.get_decoder(), base.get_input_embeddings(), base.get_output_embeddings())
    reached = {id(parameter) for module in ends if module is not None for parameter in module.parameters()}

    def outside(module: nn.Module, path: str) -> Iterator[str]:
        inside = [id(parameter) in reached for parameter in module.parameters()]
        if inside and not any(inside):
            yield path
        elif not all(inside):
            for name, child in module.named_children():
                yield from outside(child, f"{path}.{name}" if path else name)

    return list(outside(base, ""))


def _excluded(base: nn.Module, *, everything: bool) -> str | None:
    """peft's `exclude_modules`: what text never reaches; of `everything` also what looks linear and is not.

    Routers that give back more than a product, and the projections of state-space layers (they have a convolution and
    a D) whose weights a fused kernel reads itself: adapters there would get no gradient.
    """
    patterns = [rf"{re.escape(name)}(\..*)?" for name in modules_without_text(base)]
    for path, module in base.named_modules() if everything else ():
        parent = path.rsplit(".", 2)[-2:]
        if _is_own_linear(module):
            patterns.append(r"(.*\.)?" + re.escape(".".join(parent)))
        if isinstance(getattr(module, "conv1d", None), nn.Conv1d) and hasattr(module, "D"):
            patterns.append(rf"(.*\.)?{re.escape(parent[-1])}\.(out_proj|x_proj|dt_proj)")
    return "|".join(dict.fromkeys(patterns)) or None


def _is_own_linear(module: nn.Module) -> bool:
    """Whether a model brings this subclass of a linear layer, with a forward of its own."""
    own = type(module).__module__.startswith(("transformers.models.", "transformers_modules."))
    return own and isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward


def _warn_of_unadapted(policy: Any) -> None:
    """One line about the matrices that all-linear does not adapt, such as experts in tensors unknown to peft."""
    from peft.tuners.lora import LoraLayer

    base = policy.get_base_model()
    layers = [layer for layer in policy.modules() if isinstance(layer, LoraLayer)]
    adapted = {id(getattr(layer.get_base_layer(), adapted_name(layer))) for layer in layers}
    aside = [base.get_output_embeddings(), *(base.get_submodule(name) for name in modules_without_text(base))]
    for module in base.modules():
        if isinstance(module, (nn.Embedding, nn.Conv1d)) or any(module is other for other in aside):
            adapted |= {id(parameter) for parameter in module.parameters()}
    left: dict[str, int] = {}
    for name, parameter in base.named_parameters():
        trained = parameter.requires_grad or "original_module" in name
        matrix = parameter.ndim > 2 or (parameter.ndim == 2 and name.endswith("weight"))
        if matrix and not trained and id(parameter) not in adapted:
            short = ".".join(part for part in name.split(".") if part != "base_layer" and not part.isdigit())
            short = ".".join(short.removesuffix(".weight").split(".")[-2:])
            left[short] = left.get(short, 0) + parameter.numel()
    share = sum(left.values()) / parameter_counts(base)[1]
    if share > 0.01:
        logger.warning("all-linear adapts no %s, which are %.0f%% of the weights", ", ".join(left), 100 * share)


def disable_bnb_eval_kernels(model: nn.Module) -> None:
    """Make quantised layers compute the same in training and in evaluation mode.

    4-bit: on CPUs with AVX512-BF16 the first forward in evaluation mode repacks the weights, and every later training
    forward uses a kernel without autograd: wrong gradients below that layer, and no error.
    8-bit: on CPUs evaluation mode rounds activations to 8 bits and training mode does not, so a reference, a sampler
    and the policy would differ with the same weights (by 0.1 in the logits of a small model).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        elif type(module).__name__ == "Linear8bitLt":
            module.train()
            module.train = MethodType(_stay_training, module)  # type: ignore[method-assign]


def _stay_training(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


@contextmanager
def quiet_peft(what: str) -> Iterator[None]:
    """Without peft's warnings that say nothing to a user; its errors as one sentence that begins with `what`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")  # it sees GPT-2's layout by itself
        # it looks at modules only; ranks and scales of experts, which are parameters, are set all the same
        warnings.filterwarnings("ignore", message=r"The following (rank|alpha)_pattern keys did not match any targeted")
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{what}: peft says: {first_line(error).rstrip('.')}.") from error
