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
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from loops.shared.attention import Layout, NotPackable, compare_masks, register_attention
from loops.shared.layers import LOGITS_TOLERANCE, base_model, largest_list
from losses.logprobs import token_logprobs


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

    takes_packed_batches = True  # an instance that the self-check found not packable has False

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
            raise RuntimeError(f"the layers of {type(self).__name__} are not all plain attention")
        hidden = out[0][0].index_select(0, packed.predictors)  # [K, H]
        softcap, scale = head_scaling(self.config)
        return self.get_output_embeddings()(hidden, packed.targets, temperature, softcap, scale)


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


def check_context(model: nn.Module, longest: int, *, setting: str, say) -> None:
    """Compare the longest row, in tokens, with the model's positions: ValueError, naming `setting`, where they are
    learned; a note where they are computed (rotary), since a model is poor beyond those it was trained on."""
    limit = getattr(base_model(model).config.get_text_config(), "max_position_embeddings", None)
    if learned_positions(model) and longest > limit:
        raise ValueError(
            f"the longest row has {longest} tokens and the model only {limit} positions (max_position_embeddings in "
            f"its config.json): lower {setting}."
        )
    if limit and longest > limit:
        say(f"note: rows of up to {longest} tokens go beyond the {limit} positions that the model was made for")


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
    causal_lm.takes_packed_batches = True
    causal_lm.set_attn_implementation(register_attention())


def is_packed(model: nn.Module) -> bool:
    """Whether a model, below its wrappers, takes packed batches: `enable_packing` prepared it for them."""
    return getattr(base_model(model), "takes_packed_batches", False)


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
    """Inside, every window, chunk or the like that rows of `length` tokens do not reach is a quarter of `length`;
    yields whether there are any. They enter attention by their value alone, so what holds for these holds for those.
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
    """Difference of log-probabilities between the packed and the plain forward: the largest, in 16 bits the largest of
    the rows' medians. Raises NotPackable."""
    try:
        packed = score(model, batch).logprobs
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        name = type(base_model(model)).__name__
        raise NotPackable(f"the packed forward of {name} is not possible ({error})") from error
    with compare_masks(batch.padded()[1].sum(dim=1)):
        plain = score_plain(model, batch).logprobs
    rows = [row[mask] for row, mask in zip((packed - plain).abs(), batch.mask, strict=True) if mask.any()]
    by_row = [row.median() if dtype.itemsize == 2 else row.max() for row in rows]
    return torch.stack(by_row).max().item() if rows else 0.0


@torch.no_grad()
def self_check(model: nn.Module, batch, *, compute_dtype: torch.dtype) -> tuple[float, str | None]:
    """Compare the packed with the plain forward on a batch out of real rows (`data.pack.pack_check`), and once more
    with windows that its rows reach, where the model's own are wider; dropout is off while it runs.

    Returns (`_difference`, None), or (nan, reason) for a model whose layers or masks packing
    does not know, which the loops then train on the plain path. Raises ValueError when all layers are packed attention
    and the two forwards still disagree.
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
    logits = model(input_ids=torch.cat([ids, other]), use_cache=False).logits.float()
    model.train(was_training)
    each = (logits[0] - logits[1]).square().mean(-1).sqrt()  # [tokens]
    moved = (each[:-1].mean() / each[-1]).item()
    if moved > LOGITS_TOLERANCE[compute_dtype]:
        raise ValueError(
            f"model_id: {type(base_model(model)).__name__} is not causal: logits before a token move {moved:.2g} times "
            "as much as its own when that token changes, so it would see what it is to predict; choose a decoder, or "
            "set is_decoder: true in its config.json if it was trained as one."
        )


def choose_packing(model: nn.Module, batch, *, wanted: bool, compile: bool = False, say) -> bool:
    """Prepare the model for packed batches and check them on a real one; False where the plain path must be taken.

    Call before sharding, on every process. compile: `compile_layers` too. say: function that prints one line. Raises
    ValueError as `check_causal`, on either path, and `self_check` do.
    """
    if compile and not wanted:
        raise ValueError("compile: true works on packed batches only; set packing: true, or compile: false.")
    dtype = max((p.dtype for p in model.parameters() if p.dtype in TOLERANCE), key=TOLERANCE.__getitem__)
    device = next(model.parameters()).device
    if device.type != "meta":  # with cpu_ram_efficient_loading only the first process of a machine has weights yet
        check_causal(model, batch.to(device), compute_dtype=dtype)
    if not wanted:
        return False
    own_attention = base_model(model).config._attn_implementation
    try:
        enable_packing(model)
    except NotPackable as error:
        say(f"packing: off, {error}")
        return False
    if compile:
        compile_layers(model)
    difference, reason = float("nan"), None
    if device.type != "meta":
        difference, reason = self_check(model, batch.to(device), compute_dtype=dtype)
    if torch.distributed.is_initialized():
        (reason,) = broadcast_object_list([reason])
    if reason:  # some models leave to an attention that they do not know what they do themselves for their own
        base_model(model).set_attn_implementation(own_attention)
        base_model(model).takes_packed_batches = False
    say(
        f"packing: off, {reason}"
        if reason
        else f"packing: on, within {difference:.1e} of the plain forward on the first rows"
    )
    return reason is None
