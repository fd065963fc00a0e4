"""The reference model, which KL terms and DPO compare the policy with: the policy as it stood at the start, or, with
`ref_update`, a model that follows the policy.

Legend: B rows, T columns, P pairs.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from loops.shared.adapters import (
    ADAPTER,
    REFERENCE_ADAPTER,
    changes_nothing,
    disable_bnb_eval_kernels,
    quiet_peft,
    upcast_modules_to_save,
)
from loops.shared.layers import reshard, unwrap
from loops.shared.models import ModelConfig, resolve_dtype
from loops.shared.policy import score

if TYPE_CHECKING:
    from accelerate import Accelerator
    from peft import PeftModel
    from transformers import PreTrainedModel


class Reference:
    """Log-probabilities under the reference model, computed per micro-batch or once before training."""

    def __init__(self, model: nn.Module, kind: str, autocast: Callable[[], AbstractContextManager] = nullcontext):
        self.model: Any = model
        self.kind = kind
        """`copy` (frozen copy), `base` (adapter off), or `adapter` (frozen copy of the starting adapter)."""
        self.autocast = autocast
        self.tables: dict[str, Tensor] = {}
        self.mixup_alpha = 0.0
        self.sync_steps = 0
        """Optimizer steps between two updates; 0 for a reference that stays."""
        self.trained: list[str] = []
        """Names of the policy's trained parameters."""

    def logprobs(self, batch, temperature: float = 1.0) -> Tensor:
        """Log-probabilities [B, T] of a `data.pack.PackedBatch` under softmax(logits / temperature); no gradients."""
        with self.autocast(), self.active() as model:
            return score(model, batch, temperature).logprobs

    def sequence_logprobs(self, batch, rows: Sequence[int], split: str = "train") -> Tensor:
        """Log-probability [B] of each completion of the pairs `rows`, a sum over its tokens: from the table that
        `precompute` made of this split, else computed from the batch."""
        if split in self.tables:
            return self.tables[split][rows].flatten()
        return self.logprobs(batch).sum(dim=1)

    def precompute(
        self,
        split: str,
        num_pairs: int,
        microbatches: Callable[[Sequence[int]], Iterable[tuple[Any, Sequence[int]]]],
        folder: Path,
        fingerprint: str,
        accelerator: Accelerator,
    ) -> None:
        """Make the table of a split's `sequence_logprobs` [P, 2], kept in `folder` under its `fingerprint`.

        microbatches: numbers of pairs -> this process's (batch, numbers of its pairs). A file that is there is taken if
        its fingerprint and, recomputed, its first pairs agree; otherwise ValueError.
        """
        file, is_main = folder / f"reference_{split}.pt", accelerator.is_main_process
        saved = torch.load(file, weights_only=True) if is_main and file.exists() else None
        (saved,) = broadcast_object_list([saved])  # other processes may see an older file, or none
        rows = range(num_pairs if saved is None else min(num_pairs, 4 * accelerator.num_processes))
        table = torch.zeros(num_pairs, 2, dtype=torch.float64)
        for batch, chosen in microbatches(rows):
            table[chosen] = self.logprobs(batch).sum(dim=1).double().cpu().view(len(chosen), 2)
        table = accelerator.reduce(table.to(accelerator.device), "sum")
        if saved is None:
            if is_main:
                torch.save({"fingerprint": fingerprint, "logps": table.cpu()}, file.with_suffix(".tmp"))
                file.with_suffix(".tmp").replace(file)
            self.tables[split] = table
            return
        stored = saved["logps"].to(table)
        half = accelerator.mixed_precision != "no" or next(self.model.parameters()).itemsize < 4
        bounds = {"rtol": 1e-3, "atol": 1.0 if half else 0.01}
        if saved["fingerprint"] != fingerprint or not torch.allclose(stored[rows], table[rows], **bounds):
            differs = "was computed from another model, other pairs or settings"
            raise ValueError(f"{file} {differs}; delete it to compute it again.")
        self.tables[split] = stored

    @staticmethod
    def fingerprint(pairs: Sequence[Any], model: ModelConfig, seed: int, accelerator: Accelerator) -> str:
        """Digest of all that decides the log-probabilities of pairs, and of nothing that only costs time."""
        names = "model_id revision from_scratch load_in_8bit load_in_4bit"
        if model.load_in_4bit:
            names += " bnb_4bit_quant_type bnb_4bit_compute_dtype bnb_4bit_use_double_quant"
        source = [getattr(model, name) for name in names.split()]
        source += [seed if model.from_scratch else None]
        source += [resolve_dtype(model, accelerator.device), accelerator.mixed_precision]
        digest = hashlib.sha256(repr(source).encode())
        for pair in pairs:  # without its number, which is for messages
            completions = [(list(ids), list(map(bool, flags))) for ids, flags in pair.completions()]
            digest.update(repr((list(pair.prompt_ids), completions)).encode())
        return digest.hexdigest()

    def follow(self, ref_update: str, mixup_alpha: float, sync_steps: int) -> None:
        """Let `update` move the weights: `ema` by mixup_alpha, `sync` the whole way; `none` lets them stay.

        Raises ValueError for values that mean nothing, by their names in a loop's Config.
        """
        if ref_update not in ("none", "ema", "sync"):
            raise ValueError(f"ref_update is {ref_update!r}; choose none, ema or sync.")
        if not 0.0 < mixup_alpha <= 1.0:
            raise ValueError(f"ref_model_mixup_alpha is {mixup_alpha}; give a weight above 0, up to 1.")
        if sync_steps < 1:
            raise ValueError(f"ref_model_sync_steps is {sync_steps}; give 1 or more.")
        self.mixup_alpha = 1.0 if ref_update == "sync" else mixup_alpha
        self.sync_steps = 0 if ref_update == "none" else sync_steps

    @torch.no_grad()
    def update(self, policy: nn.Module, step: int) -> None:
        """Every `sync_steps` optimizer steps: weights = mixup_alpha x the policy's + (1 - mixup_alpha) x their own.

        step: optimizer steps done. Sums are formed in at least float32. Every process calls this.
        """
        if not self.sync_steps or step % self.sync_steps:
            return
        trained = unwrap(policy)
        reshard(trained)
        for name, own in self.tensors().items():
            new = trained.get_parameter(name).detach()
            if isinstance(own, DTensor):  # both are cut in the same way
                own, new = own.to_local(), new.to_local()
            wide = torch.promote_types(own.dtype, torch.float32)
            own.copy_(own.to(wide).lerp(new.to(wide), self.mixup_alpha))

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of the reference, under the names of the policy's parameters: the weights that
        `update` moves, none for a reference that stays. A resume copies into them."""
        names = self.trained if self.sync_steps else []
        if names:
            reshard(self.model)
        if self.kind == "copy":
            return {name: self.model.get_parameter(name).detach() for name in names}
        return {name: self.model.get_parameter(_copied(name)).detach() for name in names}

    def release(self) -> None:
        """Free the memory of a copy; from here on only tables answer."""
        self.model = None

    @contextmanager
    def active(self) -> Iterator[nn.Module]:
        """The reference as a model to call, without gradients and in evaluation mode (no dropout); adapter, gradient
        flags and training mode are the policy's own again afterwards."""
        with torch.no_grad():
            if self.kind == "copy":
                yield self.model
                return
            policy = self.model
            reshard(policy)  # flags belong to the shards, and units left gathered would show other parameters
            was_training = policy.training
            # peft turns requires_grad of whole adapters on and off as it switches between them
            flags = [(parameter, parameter.requires_grad) for parameter in policy.parameters()]
            policy.eval()
            try:
                if self.kind == "base":
                    with policy.disable_adapter():
                        yield policy
                else:
                    policy.set_adapter(REFERENCE_ADAPTER, inference_mode=True)
                    yield policy
            finally:
                reshard(policy)
                if self.kind == "adapter":
                    policy.set_adapter(ADAPTER)
                for parameter, flag in flags:
                    parameter.requires_grad_(flag)
                policy.train(was_training)


def build_reference(
    policy: PreTrainedModel | PeftModel,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    *,
    ref_update: str = "none",
    mixup_alpha: float = 0.6,
    sync_steps: int = 512,
) -> Reference:
    """The reference of a policy as it is now. Call before sharding, before resuming, and before the first step.

    A policy without adapter is copied. A fresh adapter changes nothing yet, so switching it off gives the start back.
    An adapter that is continued, or one that the reference is to follow (`Reference.follow`), is copied beside itself,
    frozen; exports leave the copy out. autocast: entered around each forward, as `Accelerator.autocast`.
    """
    from peft import PeftModel

    assert all("forward" not in vars(module) for module in policy.modules()), (
        "a forward set on an instance would still be the policy's own in the copy"
    )
    trained = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
    if not isinstance(policy, PeftModel):
        reference = Reference(copy.deepcopy(policy).requires_grad_(False).eval(), "copy", autocast)
    elif ref_update == "none" and changes_nothing(policy):
        reference = Reference(policy, "base", autocast)
    else:
        _copy_adapter(policy)
        reference = Reference(policy, "adapter", autocast)
    reference.trained = trained
    reference.follow(ref_update, mixup_alpha, sync_steps)
    return reference


def _copied(name: str) -> str:
    """The name that a parameter of the adapter has in the adapter's frozen copy."""
    return ".".join(REFERENCE_ADAPTER if part == ADAPTER else part for part in name.split("."))


def _copy_adapter(policy: PeftModel) -> None:
    """Add a frozen copy of the adapter beside it."""
    flags = [(parameter, parameter.requires_grad) for parameter in policy.parameters()]
    device = next(policy.parameters()).device
    # the copy's random start is overwritten: the caller's random state stays
    with quiet_peft("reference"), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        settings = copy.deepcopy(policy.peft_config[ADAPTER])
        settings.init_lora_weights = True  # pissa, olora, loftq, ... would change the base weights a second time
        policy.add_adapter(REFERENCE_ADAPTER, settings)
    policy.set_adapter(ADAPTER)
    upcast_modules_to_save(policy)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            parts = name.split(".")
            if REFERENCE_ADAPTER in parts:
                original = ".".join(ADAPTER if part == REFERENCE_ADAPTER else part for part in parts)
                parameter.copy_(policy.get_parameter(original)).requires_grad_(False)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    disable_bnb_eval_kernels(policy)
    policy.train(policy.training)
