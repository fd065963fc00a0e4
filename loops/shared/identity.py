"""What makes a run this run: digests of its rows and weights, the settings that decide, and where it came from."""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import json
import platform
import subprocess
import sys
import time
from array import array
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from loops.shared.layers import plain_name
from loops.shared.rollout.config import Sampling
from loops.shared.tracking import without_passwords

if TYPE_CHECKING:
    from accelerate import Accelerator

# Settings that a run may change when it is resumed: they cost time or memory only, ...
FREE = {"gradient_checkpointing", "activation_offloading", "compile", "attn_implementation", "merge_weights"}
FREE |= {"bnb_4bit_quant_storage", "eval_reward", "precompute_ref_log_probs", "prompts_per_step"}
# ... or decide what is compared itself: the rows, and the weights and the dtype that training began with.
OF_WEIGHTS = ("model_id", "revision", "torch_dtype", "from_scratch", "trust_remote_code")


def settings_of_identity(settings: dict) -> dict:
    """`decides`: settings that make it another run; `rows_from`, `weights_from`: those that explain other digests."""
    own = {key: value for key, value in settings.items() if not isinstance(value, dict)}
    model, rollout = settings.get("model", {}), settings.get("rollout", {})
    decides = {**own, **model, **settings.get("reward", {})}
    if "reward" in settings:  # trains on what it samples
        decides |= {key: rollout[key] for key in ("num_generations", *vars(Sampling())) if key in rollout}
    for key in (*FREE, *OF_WEIGHTS, "tokenizer_id"):
        decides.pop(key, None)
    unused = ("lora_", "use_", "modules_to_save") if not model.get("lora_r") else ()
    unused += () if model.get("load_in_4bit") else ("bnb_",)
    decides = {key: value for key, value in decides.items() if key == "lora_r" or not key.startswith(unused)}
    rows = {"tokenizer_id": model.get("tokenizer_id"), **settings.get("data", {}), **settings.get("encode", {})}
    given = settings.get("reward", {}).get("reward_functions", ())
    for name in given.split(",") if isinstance(given, str) else given:  # a change is allowed on resume, and printed
        module, _, function = name.strip().partition(":")
        with suppress(KeyError, AttributeError, OSError, TypeError):  # one of ours, or without source
            source = inspect.getsource(getattr(sys.modules[module], function)).encode()
            rows[f"code of {name.strip()}"] = hashlib.sha256(source).hexdigest()[:8]
    found = {"decides": decides, "rows_from": rows, "weights_from": {key: model.get(key) for key in OF_WEIGHTS}}
    return json.loads(json.dumps(without_passwords(found)))


def refuse_other_run(where: str, old: dict, new: dict) -> None:
    """Raise ValueError, naming what differs, unless a run with the identity `new` may go on from `old`.

    What an older version did not record is not compared.
    """

    def differing(before: dict, after: dict) -> list[str]:
        return [f"{k} {before[k]} and this run {v}" for k, v in after.items() if k in before and before[k] != v]

    def pick(identity: dict, *keys: str) -> dict:
        return {key: identity[key] for key in keys if key in identity}

    sizes = ("loop", "seed", "rows", "packing_strategy", "mixed_precision")
    found = differing(pick(old, *sizes), pick(new, *sizes)) + differing(old.get("decides", {}), new["decides"])
    for digest, source, name in (("digest", "rows_from", "dataset_name"), ("weights", "weights_from", "model_id")):
        if digest in old and old[digest] != new.get(digest):
            found += differing(old.get(source, {}), new[source])
            what = "rows" if digest == "digest" else "weights or another config.json"
            found = found or [f"other {what} in {name} {new[source].get(name)} than are there now"]
    if found:
        raise ValueError(
            f"{where} has {', '.join(found)}: it is of another run; resume it with its own settings, or start this one "
            f"in another output_dir."
        )
    for words in differing(pick(old, "rows_per_step"), pick(new, "rows_per_step")):
        key = "prompts_per_step" if "num_generations" in new["decides"] else "train_batch_size"
        raise ValueError(
            f"{where} has {words}, which has another number of processes or another batch size: set {key}: "
            f"{old['rows_per_step']} to go on with it."
        )


def rows_digest(rows: Sequence) -> str:
    """Of encoded rows in their order: token ids, targets, and the columns that rewards read."""
    digest = hashlib.sha256()
    for row in rows:
        for name, value in vars(row).items():
            if name in ("number", "num_targets", "num_shared"):  # for messages; counts of the rest
                continue
            try:
                part = array("q", value).tobytes()
            except TypeError:
                part = json.dumps(value, default=lambda one: type(one).__name__, skipkeys=True).encode()
            digest.update(b"%d " % len(part) + part)
    return digest.hexdigest()


def weights_digest(model: Any, values: bool) -> str:
    """Of the model's config and of its weights' names, shapes and dtypes and, with `values`, 64 values of each."""
    config = {key: value for key, value in model.config.to_diff_dict().items() if key[0] != "_"}
    for key in ("transformers_version", "dtype", "torch_dtype", "quantization_config", "use_cache"):
        config.pop(key, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in model.named_parameters():
        flat = weight.detach().flatten()
        digest.update(f"{plain_name(name)} {tuple(weight.shape)} {weight.dtype}".encode())
        if values and not weight.is_meta:
            digest.update(flat[:: max(1, len(flat) // 64)][:64].to("cpu", torch.float64).numpy().tobytes())
    return digest.hexdigest()


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for package in ("torch", "transformers", "accelerate", "peft", "datasets", "bitsandbytes", "flash-attn", "vllm"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def provenance(accelerator: Accelerator, seed: int, identity: dict) -> dict:
    """Where this run came from: command, code, packages, machine, and what makes another run another one."""

    def git(*words: str) -> str | None:
        try:
            here = Path(__file__).parent
            return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None  # not a checkout: an installed copy has no commit to name

    changes = git("status", "--porcelain")
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "argv": without_passwords(sys.argv),
        "seed": seed,
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": None if changes is None else bool(changes),
        "packages": package_versions(),
        "processes": accelerator.num_processes,
        "device": str(accelerator.device),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "mixed_precision": accelerator.mixed_precision,
        "platform": platform.platform(),
        "identity": identity,
    }
