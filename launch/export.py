"""A trained model as a Hugging Face folder, from any run, checkpoint or adapter.

    python -m launch.export                                         # the newest checkpoint under results/
    python -m launch.export results/my-run                          # a run's newest weights
    python -m launch.export CHECKPOINT --no_merge                   # the adapter alone
    python -m launch.export CHECKPOINT --base_model Qwen/Qwen3-8B   # a checkpoint without its run folder

Full, LoRA and QLoRA are recognised by what was saved. The policy is rebuilt as in training, the trained tensors are
loaded, and one folder is written: `CHECKPOINT.hf_model` (adapters merged; of a quantised base into the
dequantised one, which is what the adapter was trained on), or `CHECKPOINT.hf_peft` (the adapter). What was written is
loaded afresh and must give the policy's logits before it gets its name. One process, on the CPU, offline where the base
model is.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from configs.loader import load_config
from launch.trained import TrainedModel, find_trained, hint_at_base_model, rebuild_policy
from loops.shared.checkpoint_files import REPLACED
from loops.shared.layers import LOGITS_TOLERANCE
from loops.shared.models import build_tokenizer
from loops.shared.run import one_sentence_errors
from loops.shared.weights import (
    WrongLogits,
    coarsest_dtype,
    compare_logits,
    export_model,
    logits_of,
    reload_folder,
)

PROG = "python -m launch.export"
OUTPUTS = (".hf_model", ".hf_peft")
DTYPES = ("auto", *(str(dtype).removeprefix("torch.") for dtype in LOGITS_TOLERANCE))


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to export, and as what."""

    source: str | None = None
    """Run, checkpoint or adapter; left out, the newest checkpoint below checkpoints_dir."""
    base_model: str | None = None
    """Folder or hub id in place of the run's model_id."""
    checkpoints_dir: str = "results"
    """Where the newest checkpoint is looked for."""
    output: str | None = None
    """Folder to write; left out, the source's name with .hf_model or .hf_peft."""
    no_merge: bool = False
    """Write the adapter instead of a merged model."""
    dtype: str = "auto"
    """Of the written weights: auto (as in training), float32, bfloat16, float16 or float64."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype}; give {', '.join(DTYPES)}.")


def export(
    trained: TrainedModel, output: Path, *, merge: bool, dtype: torch.dtype | None = None, command: str = ""
) -> str:
    """Write `output` and return the sentence that says how it compares with the policy.

    Args:
        merge: write a merged model; else the adapter.
        dtype: of the written weights; None keeps the dtype of training.

    Raises:
        ValueError: `output` already holds files, or there is no adapter to write.
        WrongLogits: the reloaded model is not the trained one; nothing is kept.
    """
    if trained.kind == "model":
        raise ValueError(
            f"{trained.path} is a whole Hugging Face model already: use it as it is, or name a checkpoint."
        )
    if not merge and trained.model.lora_r == 0:
        raise ValueError(f"{trained.path} holds all weights and no adapter: leave out no_merge.")
    if not merge and trained.model.from_scratch:
        raise ValueError(f"the base of {trained.path} is random and kept nowhere: leave out no_merge.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} already holds files: remove it, or give another output.")
    with hint_at_base_model():
        tokenizer = build_tokenizer(trained.model)
    policy: Any = rebuild_policy(trained)
    expected = logits_of(policy)
    effect = ""
    if trained.model.lora_r:  # in low precision only an effect well above the limit shows that the adapter is in
        with policy.disable_adapter():
            moved = (logits_of(policy) - expected).square().mean().sqrt() / expected.std()
        effect = f"; the adapter moves them by {float(moved):.2g}"
    card = {
        "base_model": trained.model.model_id,
        "loop": trained.loop or "",
        "dataset": trained.dataset or "",
        "command": command,
        "settings": {"checkpoint": trained.path.name, "step": trained.step, "lora_r": trained.model.lora_r},
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".export-") as temporary:
        folder = Path(temporary) / output.name
        export_model(policy, tokenizer, folder, merge=merge, card=card, dtype=dtype)
        coarsest = coarsest_dtype(policy, dtype)
        quantisation = getattr(policy.config, "quantization_config", None)
        del policy  # one model at a time
        reloaded = reload_folder(folder, trained.model, quantisation)
        try:
            sentence = compare_logits(expected, logits_of(reloaded), LOGITS_TOLERANCE[coarsest], coarsest)
        except WrongLogits as error:
            raise WrongLogits(f"{error}; nothing was kept.") from None
        shutil.rmtree(output, ignore_errors=True)  # an empty folder
        folder.rename(output)
    return sentence + effect


def main(argv: list[str] | None = None) -> int:
    """The command; 0 when the export is written, 1 when its logits are wrong, 2 for what the user can correct."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        with one_sentence_errors(PROG) as prints:
            options: Options = load_config(Options, argv, prog=PROG, prints=prints, positional=("source",))
            transformers_logging.disable_progress_bar()
            trained = find_trained(
                options.source, checkpoints_dir=options.checkpoints_dir, base_model=options.base_model
            )
            name = trained.path.absolute().name.removeprefix(REPLACED) + OUTPUTS[options.no_merge]
            output = Path(options.output or trained.path.absolute().with_name(name)).expanduser()
            print(f"{trained.path}: {trained}", flush=True)
            dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
            command = " ".join([PROG, *argv])
            print(export(trained, output, merge=not options.no_merge, dtype=dtype, command=command))
    except SystemExit as stop:
        return int(stop.code or 0)
    print(f"written to {output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
