"""The packed forward: a batch in, the log-probability of every target token out.

The causal LM's own `forward` learns one more keyword, `packed=batch`: the decoder runs once over the flat row, and the
head turns hidden states into log-probabilities without ever holding `[N, V]` logits. Because it stays the model's own
forward, DDP, FSDP2, PEFT, gradient checkpointing and autocast see nothing unusual; because the head is called, not its
weight read, it works inside whatever FSDP unit owns it.

Legend: B rows, T columns, K targets, M places of targets, N tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from loops.shared.attention import Layout, NotPackable, compare_masks, register_attention
from loops.shared.layers import LOGITS_TOLERANCE, base_model, largest_list, reshard
from losses.logprobs import token_logprobs

if TYPE_CHECKING:
    from accelerate import Accelerator


class Scores(NamedTuple):
    """Log-probability and entropy of a batch's targets; zero where the batch's mask is False."""

    logprobs: Tensor  # [B, T]
    entropy: Tensor  # [B, T] in nats


class _Head(nn.Linear):
    """A language-model head that can turn hidden states straight into log-probabilities of given targets."""

    def forward(self, hidden, targets=None, temperature=1.0, softcap=None, scale=1.0):
        if targets is None:
            return super().forward(hidden)
        weight, bias = self.weight, self.bias
        if torch.is_autocast_enabled(hidden.device.type):  # multiply in autocast's dtype, as a linear layer would
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        return token_logprobs(hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap, scale=scale)


class _PackedForward:
    """Mixed into a causal LM's class by `enable_packing`."""

    takes_packed_batches = False  # True between `enable_packing` and `disable_packing`

    def packed_forward(self, packed, temperature: float) -> tuple[Tensor, Tensor]:
        """(log-probabilities [K], entropies [K]) of the batch's targets."""
        layout = Layout(packed.segments, packed.input_ids.device)
        out = self.get_decoder()(
            input_ids=packed.input_ids,
            position_ids=packed.position_ids,
            # a ready-made 4-d mask keeps transformers from building one; the packed attention does not look at it
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=packed.input_ids.device),
            use_cache=False,
            layout=layout,
        )
        if layout.calls < self.config.get_text_config().num_hidden_layers:
            raise RuntimeError(f"the layers of {class_name(self)} are not all plain attention")
        hidden = out[0][0].index_select(0, packed.predictors)  # [K, H]
        softcap, scale = head_scaling(self.config)
        return self.get_output_embeddings()(hidden, packed.targets, temperature, softcap, scale)


def class_name(model: nn.Module) -> str:
    """The architecture's name, which FSDP2 prefixes."""
    return type(model).__name__.removeprefix("FSDP")


def head_scaling(config) -> tuple[float | None, float]:
    """(soft-cap, scale) that the model's config puts on logits: Gemma's cap, Cohere's factor, Granite's divisor."""
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None) or 1.0
    return softcap, scale / (getattr(config, "logits_scaling", None) or 1.0)


def learned_positions(model: nn.Module) -> int | None:
    """Positions of a model that learns them (GPT-2, OPT), so that a longer row cannot be computed; None elsewhere."""
    causal_lm = base_model(model)
    limit = getattr(causal_lm.config.get_text_config(), "max_position_embeddings", None)
    words = causal_lm.get_input_embeddings()
    tables = [m.num_embeddings for m in causal_lm.modules() if isinstance(m, nn.Embedding) and m is not words]
    return limit if limit and any(rows in (limit, limit + 2) for rows in tables) else None  # OPT's has two more


def check_context(model: nn.Module, longest: int, *, setting: str, print_main: Callable[[str], object]) -> None:
    """Compare the longest row, in tokens, with the model's positions.

    Where positions are learned, a longer row raises ValueError, which names `setting`. Where they are computed, as by
    rotary embeddings, it prints a note: a model is poor beyond the positions that it was trained on.
    """
    limit = getattr(base_model(model).config.get_text_config(), "max_position_embeddings", None)
    if learned_positions(model) and longest > limit:
        raise ValueError(
            f"the longest row has {longest} tokens and the model only {limit} positions (max_position_embeddings in "
            f"its config.json): lower {setting}."
        )
    if limit and longest > limit:
        print_main(f"note: rows of up to {longest} tokens go beyond the {limit} positions that the model was made for")


def enable_packing(model: nn.Module) -> None:
    """Give a causal LM (or the one inside a PEFT model) the `packed=` forward and the packed attention, in place.

    Raises NotPackable where the model's parts do not fit.
    """
    causal_lm = base_model(model)
    if not causal_lm._can_set_attn_implementation():
        raise NotPackable(f"{type(causal_lm).__name__} does not call transformers' attention interface")
    decoder = causal_lm.get_decoder()
    if decoder is causal_lm:
        raise NotPackable(f"{type(causal_lm).__name__} has no decoder apart from its head")
    if "position_ids" not in inspect.signature(decoder.forward).parameters:
        raise NotPackable(f"{type(decoder).__name__} counts the positions of a row itself")
    if any(isinstance(module, nn.Conv1d) for module in decoder.modules()):
        raise NotPackable(f"{type(decoder).__name__} has convolutions, which would mix neighbouring rows")
    head = causal_lm.get_output_embeddings()
    linears = [m for m in ([] if head is None else head.modules()) if type(m) in (nn.Linear, _Head)]
    if not linears or any(hasattr(m, "lora_A") for m in head.modules()):
        raise NotPackable(f"the head of {type(causal_lm).__name__} is no plain linear layer")
    for linear in linears:
        linear.__class__ = _Head
    if not isinstance(causal_lm, _PackedForward):
        original = type(causal_lm)

        @functools.wraps(original.forward)
        def forward(self, *args, packed=None, temperature=1.0, **kwargs):
            if packed is not None:
                return self.packed_forward(packed, temperature)
            return original.forward(self, *args, **kwargs)

        # same name, so that an exported config.json still names the architecture
        names = {"forward": forward, "__module__": original.__module__, "__qualname__": original.__qualname__}
        causal_lm.__class__ = type(original.__name__, (_PackedForward, original), names)
    if not is_packed(causal_lm):
        causal_lm.attention_before_packing = causal_lm.config._attn_implementation
    causal_lm.takes_packed_batches = True
    causal_lm.set_attn_implementation(register_attention())


def is_packed(model: nn.Module) -> bool:
    """Whether a model, below its wrappers, takes packed batches: `enable_packing` prepared it for them."""
    return getattr(base_model(model), "takes_packed_batches", False)


def disable_packing(model: nn.Module) -> None:
    """Undo what `enable_packing` changed in the plain forward: `score` takes it, with the attention of before."""
    causal_lm = base_model(model)
    if is_packed(causal_lm):  # some models leave to an attention that they do not know what they do for their own
        causal_lm.set_attn_implementation(causal_lm.attention_before_packing)
        causal_lm.takes_packed_batches = False


def compile_layers(model: nn.Module) -> None:
    """Regional `torch.compile`: each decoder layer of a packed model, with a symbolic number of tokens.

    The packed attention stays outside (its layout is new in every batch), so one warm-up serves all batches. Sampling
    and the plain forward run the same layers uncompiled.
    """
    for layer in largest_list(base_model(model).get_decoder()):
        layer.compile(dynamic=True)


def score(policy: nn.Module, batch, temperature: float = 1.0) -> Scores:
    """(log-probabilities [B, T], entropies [B, T]) of a `data.pack.PackedBatch` under softmax(logits / temperature).

    A model that `enable_packing` prepared takes the packed forward, any other one the plain forward of padded rows.
    """
    if not is_packed(policy):
        return score_plain(policy, batch, temperature)
    logprobs, entropy = policy(packed=batch, temperature=temperature)
    return Scores(batch.scatter(logprobs), batch.scatter(entropy))


def score_plain(model: nn.Module, batch, temperature: float = 1.0) -> Scores:
    """What `score` returns, from the plain forward of padded rows, whatever the model is prepared for."""
    with torch.compiler.set_stance("force_eager"):
        logprobs, entropy = _plain_forward(model, batch, temperature)
    return Scores(batch.scatter_entries(logprobs), batch.scatter_entries(entropy))


def _plain_forward(model: nn.Module, batch, temperature: float) -> tuple[Tensor, Tensor]:
    """The textbook computation, every row by itself: padded rows, whole logits, log-softmax, gather; [M] each."""
    input_ids, attention_mask, predictors = batch.padded()
    if not input_ids.shape[0]:  # nothing to do here, but every process must run a forward
        input_ids, attention_mask = batch.input_ids, torch.ones_like(batch.input_ids)
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False).logits
    logits = logits.flatten(0, 1).index_select(0, batch.rows * logits.shape[1] + predictors)  # [M, V]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    everything = logits.log_softmax(-1)
    logprobs = everything.gather(-1, batch.targets[batch.sources][:, None])[:, 0]
    return logprobs, -(everything.exp() * everything).sum(-1)


# How far packed and plain log-probabilities may differ, by dtype of the computation. In 32 and 64 bits every token
# counts: measured 2e-6 in float32. In 16 bits the median of each row: a router that rounds the other way moves single
# tokens of a right model by up to 1, what packing gets wrong (masks, positions, scales) moves rows. Measured on 12
# layers of 8 to 32 experts: 0.04 in bfloat16, 0.009 in float16; without experts 0.01 and 0.001.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 0.15, torch.float16: 0.03}


# Settings of a config, or of a module, that count tokens: only rows of more tokens feel them.
LIMITS = ("sliding_window", "attention_chunk_size", "index_topk", "keep_window_size", "floor_scale")


@contextmanager
def _lowered_limits(model: nn.Module, length: int) -> Iterator[bool]:
    """Lower every limit in `LIMITS` that rows of `length` tokens do not reach to a quarter of `length`.

    Yields whether there are any. A limit enters attention by its value alone, so a check of one value holds for all.
    """
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    changed = []
    for holder in (*configs.values(), *model.modules()):
        for name in LIMITS:  # of modules only their own: peft's wrappers answer for what they wrap
            value = vars(holder).get(name) if isinstance(holder, nn.Module) else getattr(holder, name, None)
            if isinstance(value, (int, float)) and value >= length:
                changed.append((holder, name, value))
                setattr(holder, name, max(1, length // 4))
    try:
        yield bool(changed)
    finally:
        for holder, name, value in changed:
            setattr(holder, name, value)


def _difference(model: nn.Module, batch, dtype: torch.dtype) -> float:
    """Largest difference of log-probabilities between the packed and the plain forward; in 16 bits the largest median
    of a row. Raises NotPackable."""
    try:
        packed = score(model, batch).logprobs
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        raise NotPackable(f"the packed forward of {class_name(base_model(model))} is not possible ({error})") from error
    with compare_masks(batch.padded()[1].sum(dim=1)):
        plain = score_plain(model, batch).logprobs
    rows = [row[mask] for row, mask in zip((packed - plain).abs(), batch.mask, strict=True) if mask.any()]
    by_row = [row.median() if dtype.itemsize == 2 else row.max() for row in rows]
    return torch.stack(by_row).max().item() if rows else 0.0


@torch.no_grad()
def self_check(model: nn.Module, batch, *, compute_dtype: torch.dtype) -> tuple[float, str | None]:
    """Compare the packed with the plain forward on a batch of real rows (`data.pack.pack_check`), without dropout.

    Where the model's windows are wider than the rows, the comparison is repeated with narrow ones. Returns
    (`_difference`, None), or (nan, reason) for a model that packing does not fit. Raises ValueError where all layers
    are packed attention and the two forwards still disagree.
    """
    was_training = model.training
    model.eval()
    try:
        difference = _difference(model, batch, compute_dtype)
        with _lowered_limits(model, batch.padded()[0].shape[1]) as any_limits, torch.compiler.set_stance("force_eager"):
            difference = max(difference, _difference(model, batch, compute_dtype)) if any_limits else difference
    except NotPackable as error:
        return float("nan"), str(error)
    finally:
        model.train(was_training)
    limit = TOLERANCE[compute_dtype]
    if not difference <= limit:
        raise ValueError(
            f"packed and plain log-probabilities differ by {difference:.2g} (limit {limit:.2g} in {compute_dtype}) on "
            "the first rows; set packing: false and report the model's architecture."
        )
    return difference, None


@torch.no_grad()
def check_causal(model: nn.Module, batch, *, compute_dtype: torch.dtype) -> None:
    """Raise ValueError for a model that sees its targets: change the last token, the logits before it must not move."""
    ids = batch.input_ids[:, :4]  # few, so that each weighs in what sees them all
    other = ids.clone()
    other[0, -1] = (other[0, -1] + 1) % base_model(model).get_input_embeddings().weight.shape[0]
    was_training = model.training
    model.eval()
    with torch.compiler.set_stance("force_eager"):
        logits = model(input_ids=torch.cat([ids, other]), use_cache=False).logits.float()
    model.train(was_training)
    each = (logits[0] - logits[1]).square().mean(-1).sqrt()  # [tokens]
    moved = (each[:-1].mean() / each[-1]).item()
    if moved > LOGITS_TOLERANCE[compute_dtype]:
        raise ValueError(
            f"model_id: {class_name(base_model(model))} is not causal: logits before a token move {moved:.2g} times "
            "as much as its own when that token changes, so it would see what it is to predict; choose a decoder, or "
            "set is_decoder: true in its config.json if it was trained as one."
        )


def choose_packing(model: nn.Module, *, packing: bool, compile: bool, print_main: Callable[[str], object]) -> None:
    """`enable_packing` where `packing` asks for it and the model's parts fit, `compile_layers` where `compile` does.

    Call before sharding; after it, `check_policy`.
    """
    if compile and not packing:
        raise ValueError("compile: true works on packed batches only; set packing: true, or compile: false.")
    if not packing:
        return
    try:
        enable_packing(model)
    except NotPackable as error:
        print_main(f"packing: off, {error}")
        return
    if compile:
        compile_layers(model)


def check_policy(
    policy: nn.Module,
    batch,
    accelerator: Accelerator,
    *,
    longest: int,
    setting: str,
    print_main: Callable[[str], object],
    reference: Any = None,
) -> None:
    """Check the prepared policy on a batch of real rows (`data.pack.pack_check`), on its device and sharded as it is:
    `check_context` of the longest row, `check_causal` and, where it is packed, `self_check`.

    Every process calls this, with the same batch. A policy that is found not packable goes back to the plain path, and
    so does a `Reference` that is a copy of it. Raises ValueError as the three checks do.
    """
    check_context(policy, longest, setting=setting, print_main=print_main)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    dtype = dtype or max((p.dtype for p in policy.parameters() if p.dtype in TOLERANCE), key=TOLERANCE.__getitem__)
    batch = batch.to(accelerator.device)
    check_causal(policy, batch, compute_dtype=dtype)
    if is_packed(policy):
        found = gather_object([self_check(policy, batch, compute_dtype=dtype)])
        difference, reason = max(each[0] for each in found), next((each[1] for each in found if each[1]), None)
        if reason:
            for model in (policy, *([] if reference is None else [reference.model])):
                disable_packing(model)
        print_main(
            f"packing: off, {reason}"
            if reason
            else f"packing: on, within {difference:.1e} of the plain forward on the first rows"
        )
    reshard(policy)
