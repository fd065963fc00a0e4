"""Tokenizer and policy (full, LoRA, 8-bit, 4-bit), built from one config by all three loops."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from loops.shared.adapters import (
    SavedAdapter,
    add_adapter,
    continue_adapter,
    disable_bnb_eval_kernels,
    modules_without_text,
)
from loops.shared.layers import checkpoint_activations, offload_activations, parameter_counts
from loops.shared.tracking import first_line

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_COMPUTE_DTYPES = ("auto", "bfloat16", "float16", "float32")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model, in which precision, trained how."""

    model_id: str = "data/quickstart/model"
    """Folder or hub id of a causal language model (or of a LoRA adapter, which is then continued)."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    tokenizer_id: str | None = None
    """Folder or hub id of the tokenizer; default: the model's own."""
    from_scratch: bool = False
    """Take only the folder's config.json and start from random weights drawn with `seed`."""
    trust_remote_code: bool = False
    """Allow code from the model's repository to run."""
    torch_dtype: str = "auto"
    """Dtype of the weights: float32, bfloat16, float16, float64, or auto: float32 on a CPU and when full
    fine-tuning, else bfloat16. Weights that are trained in bfloat16 are rounded stochastically."""
    attn_implementation: str = "auto"
    """transformers' name (sdpa, eager, flash_attention_2, ...), or auto: flash-attn where installed, else sdpa."""
    disable_dropout: bool = True
    """Set the base model's own dropout to 0, so that scores do not depend on chance; adapters have `lora_dropout`."""
    compile: bool = False
    """Compile the decoder layers with `torch.compile` (a minute of warm-up; needs `packing`, not with 4 or 8 bits)."""
    gradient_checkpointing: bool = False
    """Recompute activations in backward: about a third more time for far less memory."""
    activation_offloading: bool = False
    """Keep the activations that backward needs in host memory (slower; together with `gradient_checkpointing` only
    each layer's input moves)."""
    lora_r: int = 32
    """LoRA rank; 0 trains all weights (`full_ft: true` is another spelling of 0)."""
    lora_alpha: float = 64.0
    """LoRA scale numerator: updates are scaled by alpha/r."""
    lora_dropout: float = 0.0
    """Dropout in front of the adapters; 0 keeps runs exact."""
    lora_target_modules: str | list[str] = "all-linear"
    """`all-linear`, or module names (list or comma list)."""
    use_dora: bool = False
    """Weight-decomposed LoRA."""
    use_rslora: bool = False
    """Scale by alpha/sqrt(r)."""
    modules_to_save: str | list[str] | None = None
    """Modules that are trained and saved themselves, with the adapters (list or comma list)."""
    load_in_4bit: bool = False
    """Quantise the frozen base to 4 bits (QLoRA; needs lora_r > 0 and bitsandbytes)."""
    load_in_8bit: bool = False
    """Quantise the frozen base to 8 bits (needs lora_r > 0 and bitsandbytes)."""
    bnb_4bit_quant_type: str = "nf4"
    """nf4 or fp4."""
    bnb_4bit_compute_dtype: str = "auto"
    """Dtype of 4-bit matrix products; auto: bfloat16 on a GPU, float32 on a CPU."""
    bnb_4bit_quant_storage: str = "auto"
    """Dtype that holds the packed weights; auto: uint8, or under FSDP (which shards no integers) the compute dtype."""
    bnb_4bit_use_double_quant: bool = True
    """Quantise the quantisation constants too (0.4 bits less per parameter)."""
    merge_weights: bool = False
    """Export one merged model instead of the adapter."""

    @property
    def exports_merged(self) -> bool:
        """Whether the export is one whole model: asked for, or because an adapter's random base is kept nowhere."""
        return self.merge_weights or self.from_scratch

    def __post_init__(self) -> None:
        def choose(key: str, allowed: tuple[str, ...]) -> None:
            if getattr(self, key) not in allowed:
                raise ValueError(f"{key} is {getattr(self, key)!r}; choose one of {', '.join(allowed)}.")

        choose("torch_dtype", ("auto", *_DTYPES))
        choose("bnb_4bit_quant_type", ("nf4", "fp4"))
        choose("bnb_4bit_compute_dtype", _COMPUTE_DTYPES)
        choose("bnb_4bit_quant_storage", (*_COMPUTE_DTYPES, "uint8"))
        quantised = [key for key in ("load_in_4bit", "load_in_8bit") if getattr(self, key)]
        if len(quantised) == 2:
            raise ValueError("load_in_4bit and load_in_8bit are both true; keep one of them.")
        for key in quantised:
            if self.compile:
                raise ValueError(f"compile does not know the matrix products of {key}; drop one of them.")
            if self.from_scratch:
                raise ValueError(f"{key} quantises weights while reading them, and from_scratch reads none; drop one.")
            if self.torch_dtype == "float64":
                raise ValueError(f"{key} computes in at most float32; set torch_dtype to auto instead of float64.")
        if self.compile and self.activation_offloading:
            raise ValueError("activation_offloading was never seen to work with compile; drop one of them.")
        if self.lora_r < 0:
            raise ValueError(f"lora_r is {self.lora_r}; give a rank of at least 1, or 0 to train all weights.")
        if self.lora_r == 0:
            for key in ("load_in_4bit", "load_in_8bit", "use_dora", "use_rslora", "modules_to_save"):
                if getattr(self, key):
                    raise ValueError(f"{key} needs lora_r above 0, but lora_r is 0 (all weights are trained).")
            if self.torch_dtype == "float16":
                raise ValueError("torch_dtype float16 is too narrow to train with lora_r 0; use float32 or bfloat16.")
        elif self.lora_alpha <= 0:
            raise ValueError(f"lora_alpha is {self.lora_alpha}; with lora_r {self.lora_r} it must be above 0.")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"lora_dropout is {self.lora_dropout}; give a probability from 0 up to, not including, 1.")


def split_names(names: str | list[str] | None) -> list[str]:
    """`"q_proj, v_proj"`, `["q_proj", "v_proj"]` or None as a list of names."""
    if names is None:
        return []
    parts = names.split(",") if isinstance(names, str) else names
    return [part.strip() for part in parts if part.strip()]


class ModelSource(NamedTuple):
    """Where the weights of a `model_id` are."""

    base: str  # folder or hub id of the base model
    revision: str | None  # hub revision of the base model
    adapter: Path | None  # folder of the adapter that is continued, if `model_id` is one


def find_source(config: ModelConfig) -> ModelSource:
    """Tell a model from an adapter, and find the adapter's base.

    A relative `base_model_name_or_path` is looked up next to the adapter, then from the working directory, and else is
    a hub id.

    Raises ValueError: `model_id` is neither a folder nor a hub id that can be read, or the adapter names no base.
    """
    from huggingface_hub import snapshot_download
    from transformers.utils import find_adapter_config_file

    folder = Path(config.model_id).expanduser()
    if folder.is_dir():
        adapter = folder if (folder / "adapter_config.json").is_file() else None
    else:
        adapter = None
        with _loading("model_id", config.model_id):
            if find_adapter_config_file(config.model_id, revision=config.revision):
                files = ["adapter_*", "*.json", "*.jinja", "*.model"]
                adapter = Path(snapshot_download(config.model_id, revision=config.revision, allow_patterns=files))
    if adapter is None:
        return ModelSource(str(folder) if folder.is_dir() else config.model_id, config.revision, None)

    file = adapter / "adapter_config.json"
    with _loading("model_id", str(adapter)):
        saved = json.loads(file.read_text(encoding="utf-8"))
        base = saved.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{file}: base_model_name_or_path is missing; write the base model's folder or hub id there.")
    for candidate in (adapter / base, Path(base).expanduser()):  # an absolute `base` is itself in both
        if candidate.is_dir():
            return ModelSource(str(candidate), saved.get("revision"), adapter)
    return ModelSource(base, saved.get("revision"), adapter)


def build_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of `tokenizer_id`, else of `model_id` (for an adapter without one: its base model's).

    A missing pad token becomes the end token. Nothing may ever mask by it: masks come from lengths.

    Raises ValueError: no tokenizer there, or one that has no end token.
    """
    from transformers import AutoTokenizer

    if config.tokenizer_id:
        key, name, revision = "tokenizer_id", config.tokenizer_id, None
    else:
        source = find_source(config)
        key, name, revision = "model_id", source.base, source.revision
        if source.adapter and _has_tokenizer(source.adapter):
            name, revision = str(source.adapter), None
    if Path(name).expanduser().is_dir():
        name = str(Path(name).expanduser())
        if not _has_tokenizer(Path(name)):
            raise ValueError(f"{key}: the folder {name} holds no tokenizer; name one with tokenizer_id.")
    with _loading(key, name):
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=config.trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{key}: the tokenizer of {name} has no eos_token; set it in its tokenizer_config.json.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> None:
    """Raise ValueError when the tokenizer can make ids that the model has no embedding for."""
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise ValueError(
            f"tokenizer_id: its largest token id is {largest}, but model_id has only {rows} embeddings; "
            "choose a tokenizer that belongs to the model."
        )


def stop_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a completion: of the model's generation config, then of the tokenizer."""
    found: list[int] = []
    generation_config = getattr(model, "generation_config", None)
    for value in (getattr(generation_config, "eos_token_id", None), getattr(tokenizer, "eos_token_id", None)):
        if value is not None:
            found += [value] if isinstance(value, int) else value
    return list(dict.fromkeys(found))


def add_stop_tokens(model: Any, tokenizer: Any, tokens: Iterable[str]) -> None:
    """Put the tokens that end the rows' completions into the generation config, which engines and exports read."""
    ids = [*stop_token_ids(model, tokenizer), *(tokenizer.convert_tokens_to_ids(token) for token in sorted(tokens))]
    if set(ids) != set(stop_token_ids(model, None)):
        model.generation_config.eos_token_id = list(dict.fromkeys(ids))


def build_policy(
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    stop_tokens: Iterable[str] = (),
    *,
    seed: int,
    device: torch.device | str,
    for_fsdp: bool = False,
    log: Callable[[str], None] | None = None,
) -> PreTrainedModel | PeftModel:
    """The model that is trained, in training mode: a transformers causal LM, or peft's wrapper around a frozen one.

    Args:
        tokenizer: checked against the embeddings, when given.
        stop_tokens: end the rows' completions; sampling and exports read them from the model.
        seed: alone decides random weights (`from_scratch`, fresh adapters), drawn on the CPU: the same on every rank
            and device. The caller's random state is left as it was.
        device: of the weights. Unquantised weights stay on the CPU when `for_fsdp`, since sharding moves them.
        for_fsdp: the policy will be sharded with FSDP2.
        log: prints one line, how many parameters are trained.

    Dtypes: the base has `torch_dtype`; adapters (and `modules_to_save`) have at least float32, and float64 on a
    float64 base. The unquantised rest of a quantised base (norms, embeddings, head) keeps `torch_dtype`: in float32,
    as peft's `prepare_model_for_kbit_training` would have it, every activation would be float32 too.

    Raises ValueError: naming the key of the config that has to change.
    """
    device = torch.device(device)
    source = find_source(config)
    if source.adapter and config.lora_r == 0:
        raise ValueError(
            f"model_id: {source.adapter} is an adapter, which lora_r 0 (train all weights) cannot continue; export it "
            "with merge_weights: true first, or set lora_r above 0."
        )
    if config.load_in_8bit and for_fsdp:
        raise ValueError("load_in_8bit cannot be sharded by fsdp; use load_in_4bit.")

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        base = _build_base(config, source, device, for_fsdp)
        if tokenizer is not None:
            check_vocabulary(tokenizer, base)
            add_stop_tokens(base, tokenizer, stop_tokens)
        if config.disable_dropout:
            _without_dropout(base)
        if left := modules_without_text(base):
            logger.warning("%s stay as they are: no text reaches them", ", ".join(left))
            for name in left:
                base.get_submodule(name).requires_grad_(False)
        policy: Any = base
        if source.adapter:
            policy = continue_adapter(base, _read_adapter(source.adapter), _lora(config), merge=config.exports_merged)
        elif config.lora_r > 0:
            policy = add_adapter(base, _lora(config), merge=config.exports_merged)

    if config.gradient_checkpointing:
        checkpoint_activations(base)
    if config.activation_offloading:
        offload_activations(policy)
    disable_bnb_eval_kernels(policy)
    if log is not None:
        log(parameter_line(policy))
    return policy.train()


def parameter_line(model: nn.Module) -> str:
    """One line for the log, such as `trains 1,024 of 66,560 parameters (1.54%), 0.3 MB of weights`."""
    trainable, total, size = parameter_counts(model)
    return f"trains {trainable:,} of {total:,} parameters ({trainable / total:.2%}), {size / 1e6:,.1f} MB of weights"


def _build_base(config: ModelConfig, source: ModelSource, device: torch.device, for_fsdp: bool) -> PreTrainedModel:
    """The model without adapter, read or drawn, on its device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = resolve_dtype(config, device)
    with _loading("model_id", source.base):
        shape = AutoConfig.from_pretrained(
            source.base, revision=source.revision, trust_remote_code=config.trust_remote_code
        )
    attention = _choose_attention(config, shape, device)
    if config.from_scratch:
        # Drawn in float32 and then rounded: the same weights in every dtype.
        with _loading("model_id", source.base):
            model = AutoModelForCausalLM.from_config(
                shape, dtype=torch.float32, attn_implementation=attention, trust_remote_code=config.trust_remote_code
            )
        model.name_or_path = source.base
        return model.to(dtype) if for_fsdp else model.to(dtype).to(device)

    quantisation = _quantisation(config, device, for_fsdp)
    with _loading("model_id", source.base):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.base,
            config=shape,
            revision=source.revision,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
            quantization_config=quantisation,
            device_map={"": device} if quantisation is not None else None,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported here, in one sentence
        )
    model, report = loaded
    for name, found, expected in sorted(report["mismatched_keys"], key=str):
        raise ValueError(
            f"model_id: {name} is {tuple(found)} in the weights of {source.base} and {tuple(expected)} by its "
            "config.json; take both from one model."
        )
    if further := _further_layer(report["unexpected_keys"], model):
        raise ValueError(
            f"model_id: the weights of {source.base} have more layers than its config.json, such as that of {further}; "
            "take both from one model."
        )
    if report["missing_keys"]:  # transformers only warns, and leaves them random
        missing = sorted(report["missing_keys"])
        raise ValueError(
            f"model_id: {source.base} lacks {len(missing)} weights of {type(model).__name__}, such as {missing[0]}; "
            "give a causal language model's own folder or hub id."
        )
    if getattr(model, "is_quantized", False):
        if config.lora_r == 0:
            raise ValueError(f"model_id: {source.base} is quantised, which lora_r 0 cannot train; set lora_r above 0.")
        return model
    return model if for_fsdp else model.to(device)


def _further_layer(unexpected: Any, model: Any) -> str | None:
    """A weight of the file that the model would have, had it more layers; None without one."""
    if getattr(model.config.get_text_config(), "num_nextn_predict_layers", None):
        return None  # such layers draft tokens, and are not part of the model
    names, modules = {name for name, _ in model.named_parameters()}, dict(model.named_modules())
    for name in sorted(unexpected):
        match = re.match(r"(.*?)\.(\d+)\.(.*)", name)
        layers = modules.get(match[1]) if match else None
        if match and isinstance(layers, nn.ModuleList) and int(match[2]) >= len(layers):
            if any(f"{match[1]}.{number}.{match[3]}" in names for number in range(len(layers))):
                return name
    return None


def _without_dropout(model: nn.Module) -> None:
    """Dropout modules, and the rates that attention layers keep as numbers, to 0; the config stays as it was."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def resolve_dtype(config: ModelConfig, device: torch.device | str) -> torch.dtype:
    """The dtype of the (unquantised) weights; the rule of `torch_dtype`."""
    if config.torch_dtype != "auto":
        return _DTYPES[config.torch_dtype]
    if torch.device(device).type == "cpu" or config.lora_r == 0:
        return torch.float32
    return torch.bfloat16


def _choose_attention(config: ModelConfig, shape: PretrainedConfig, device: torch.device) -> str | None:
    """The name to give transformers; None lets it take sdpa, or eager for an architecture without it."""
    from transformers import AutoModelForCausalLM

    if config.attn_implementation != "auto":
        return config.attn_implementation
    if device.type != "cuda" or config.torch_dtype == "float64" or importlib.util.find_spec("flash_attn") is None:
        return None
    mapping = AutoModelForCausalLM._model_mapping
    known = type(shape) in mapping and getattr(mapping[type(shape)], "_supports_flash_attn", False)
    return "flash_attention_2" if known else None


def _quantisation(config: ModelConfig, device: torch.device, for_fsdp: bool) -> Any:
    """transformers' BitsAndBytesConfig, or None."""
    if not (config.load_in_4bit or config.load_in_8bit):
        return None
    key = "load_in_4bit" if config.load_in_4bit else "load_in_8bit"
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{key} needs bitsandbytes, which is not installed: pip install plumbline[quant].") from error
    from transformers import BitsAndBytesConfig

    if config.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = config.bnb_4bit_compute_dtype
    if compute == "auto":
        compute = "float32" if device.type == "cpu" else "bfloat16"
    storage = config.bnb_4bit_quant_storage
    if storage == "auto":
        storage = compute if for_fsdp else "uint8"
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.bnb_4bit_quant_type,
        bnb_4bit_compute_dtype=compute,
        bnb_4bit_quant_storage=storage,
        bnb_4bit_use_double_quant=config.bnb_4bit_use_double_quant,
    )


def _lora(config: ModelConfig) -> LoraConfig:
    """peft's settings of the adapter."""
    from peft import LoraConfig

    targets = split_names(config.lora_target_modules)
    alpha = int(config.lora_alpha) if float(config.lora_alpha).is_integer() else config.lora_alpha
    return LoraConfig(
        task_type="CAUSAL_LM",
        revision=config.revision,
        r=config.lora_r,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft only divides by r
        lora_dropout=config.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
        modules_to_save=split_names(config.modules_to_save) or None,
    )


def _read_adapter(folder: Path) -> SavedAdapter:
    """The settings and tensors of an adapter's folder. Raises ValueError where it has none that can be read safely."""
    from peft import PeftConfig
    from safetensors.torch import load_file

    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise ValueError(f"model_id: {folder} has no adapter_model.safetensors; pickled adapters are not read.")
    with _loading("model_id", str(folder)):
        return SavedAdapter(folder, PeftConfig.from_pretrained(str(folder)), load_file(file))


@contextmanager
def _loading(key: str, name: str) -> Iterator[None]:
    """Turn transformers' pages of text into one sentence that names the key."""
    if Path(name).is_dir():
        _refuse_pointers(key, Path(name))
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # nothing but libraries reading files runs in here
        if "trust_remote_code" in str(error):
            raise ValueError(f"{key}: {name} brings its own code; set trust_remote_code: true to run it.") from error
        reason = first_line(error).rstrip(".")
        if Path(name).is_dir():
            raise ValueError(f"{key}: {name} could not be loaded: {reason}.") from error
        near = get_close_matches(Path(name).name, [path.name for path in Path(name).parent.glob("*/")], n=1)
        hint = f" (did you mean {Path(name).with_name(near[0])}?)" if near else ""
        raise ValueError(
            f"{key}: there is no folder {name}{hint}, and as a hub id it could not be loaded: {reason}."
        ) from error


def _refuse_pointers(key: str, folder: Path) -> None:
    """Raise ValueError for files that git-lfs has not fetched."""
    for file in sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".json", ".model", ".txt")):
        with file.open("rb") as opened:
            if opened.read(23) == b"version https://git-lfs":
                raise ValueError(f"{key}: {file} is a git-lfs pointer and not the file; run git lfs pull in {folder}.")


def _has_tokenizer(folder: Path) -> bool:
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json")
    return any((folder / name).is_file() for name in names)
