"""Attention over packed batches with shared prompts, for any Hugging Face decoder.

A function registered with transformers' attention interface. Ordinary calls (generation, the plain padded forward) pass
through to sdpa; a call that carries a `layout` keyword attends segment by segment: queries of a segment see its prefix,
all segments that the prefix continues, then themselves, causally. Every token's query, key and value is computed once;
only keys and values are gathered again for each segment that continues another. On a CPU both scale queries first, as
vLLM does.

With a flash kernel (CUDA, 16-bit): one variable-length call over all segments. Elsewhere: segments of like size are
gathered into a few padded buckets, one SDPA call each.

Legend: N tokens, S segments, Q heads of queries, R heads of keys, D head dimension, b segments of one bucket.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "plumbline"
NOT_GIVEN: Any = object()  # a keyword that a call does not have; None is a value
WASTE = 1.5  # a bucket may compute this many times the query-key products that its segments need


class NotPackable(ValueError):
    """A model that packed batches do not fit; its text is the reason. Raised only while a run starts."""


@dataclass
class Bucket:
    """Segments of like size, computed as one padded SDPA call. Padding points at token 0 and is masked."""

    queries: Tensor  # [b, Lq] flat index of each query token
    keys: Tensor  # [b, Lk] flat index of each key token: prefix right-aligned, then own tokens left-aligned
    prefix_width: int  # Lp: columns of `keys` that belong to prefixes (Lk = Lp + Lq)
    prefix_lengths: Tensor  # [b]
    causal: bool  # no prefixes: a plain causal call does it, without a mask

    def mask(self, window: int | None) -> Tensor:
        """[b, 1, Lq, Lk] True where query i may look at key j."""
        width, device = self.prefix_width, self.queries.device
        i = torch.arange(self.queries.shape[1], device=device)[:, None] + width
        j = torch.arange(self.keys.shape[1], device=device)[None, :]
        allowed = j <= i
        if window is not None:
            allowed = allowed & (j > i - window)
        real = j[None] >= (width - self.prefix_lengths)[:, None, None]  # left padding of short prefixes
        return (allowed[None] & real)[:, None]


class Layout:
    """How the segments of one packed batch attend. Built once per batch, used by every layer."""

    def __init__(self, segments, device: torch.device):
        self.segments = segments
        self.prefixes: list[list] = []  # per segment, the segments that it continues, from the root on
        for segment in segments:
            parent = segment.prefix
            self.prefixes.append([*self.prefixes[parent], segments[parent]] if parent >= 0 else [])
        self.prefix_lengths = [sum(p.length for p in prefix) for prefix in self.prefixes]
        self.device = device
        self.calls = 0  # attention layers that used this layout
        self._buckets: list[Bucket] | None = None
        self._masks: dict[tuple[int, int | None], Tensor] = {}
        self._flash: tuple | None = None

    # ---- buckets (no flash kernel)

    def buckets(self) -> tuple[list[Bucket], Tensor, Tensor, Tensor]:
        """(buckets, all query indices, all key indices, index of each token in the buckets' outputs [N])."""
        if self._buckets is None:
            groups = self._groups()
            self._buckets = [self._bucket(chosen) for chosen in groups]
            self._all_queries = torch.cat([b.queries.flatten() for b in self._buckets])
            self._all_keys = torch.cat([b.keys.flatten() for b in self._buckets])
            place, offset = torch.zeros(sum(s.length for s in self.segments), dtype=torch.long), 0
            for chosen, bucket in zip(groups, self._buckets, strict=True):
                width = bucket.queries.shape[1]
                for row, number in enumerate(chosen):
                    s = self.segments[number]
                    first = offset + row * width
                    place[s.start : s.start + s.length] = torch.arange(first, first + s.length)
                offset += bucket.queries.numel()
            self._place = place.to(self.device)
        return self._buckets, self._all_queries, self._all_keys, self._place

    def _groups(self) -> list[list[int]]:
        """Segment numbers per bucket: sorted by size, with a new bucket where padding would cost too much."""

        def size(number: int) -> tuple[int, int]:
            return self.prefix_lengths[number], self.segments[number].length

        groups: list[list[int]] = []
        for rooted in (True, False):
            numbers = [i for i, s in enumerate(self.segments) if s.length and (s.prefix < 0) == rooted]
            numbers.sort(key=lambda i: (size(i)[1], size(i)[0]))
            work, widest = 0, 0
            for number in numbers:
                prefix, length = size(number)
                new_widest = max(widest, prefix)
                count = len(groups[-1]) + 1 if work else 1
                needed = work + length * (prefix + length)
                small = count * length * (new_widest + length) < 1 << 15  # so little work that one more call costs more
                if not work or (count * length * (new_widest + length) > WASTE * needed and not small):
                    groups.append([])
                    needed, new_widest = length * (prefix + length), prefix
                groups[-1].append(number)
                work, widest = needed, new_widest
        return groups

    def _bucket(self, chosen: list[int]) -> Bucket:
        lengths = torch.tensor([self.segments[i].length for i in chosen])
        starts = torch.tensor([self.segments[i].start for i in chosen])
        prefix_lengths = torch.tensor([self.prefix_lengths[i] for i in chosen])
        width, prefix_width = int(lengths.max()), int(prefix_lengths.max())
        i = torch.arange(width)[None]
        queries = torch.where(i < lengths[:, None], starts[:, None] + i, 0)
        before = torch.zeros(len(chosen), prefix_width, dtype=torch.long)
        for row, number in enumerate(chosen):
            end = prefix_width
            for p in reversed(self.prefixes[number]):
                before[row, end - p.length : end] = torch.arange(p.start, p.start + p.length)
                end -= p.length
        return Bucket(
            queries=queries.to(self.device),
            keys=torch.cat([before, queries], dim=1).to(self.device),
            prefix_width=prefix_width,
            prefix_lengths=prefix_lengths.to(self.device),
            causal=prefix_width == 0,
        )

    def bucket_mask(self, number: int, window: int | None) -> Tensor:
        """The mask of one bucket, built once per batch and window width."""
        if (number, window) not in self._masks:
            self._masks[number, window] = self.buckets()[0][number].mask(window)
        return self._masks[number, window]

    # ---- one variable-length flash call

    def flash(self) -> tuple[Tensor, Tensor, Tensor, int, int]:
        """(key index [M], cumulative query lengths [S+1], cumulative key lengths [S+1], longest query, longest key)."""
        if self._flash is None:
            paths = [[*before, s] for before, s in zip(self.prefixes, self.segments, strict=True) if s.length]
            spans = [torch.arange(s.start, s.start + s.length) for path in paths for s in path]
            lengths = [path[-1].length for path in paths]
            key_lengths = [sum(s.length for s in path) for path in paths]
            index = torch.cat(spans).to(self.device) if any(len(path) > 1 for path in paths) else None
            ends = [
                F.pad(torch.tensor(n).cumsum(0), (1, 0)).to(self.device, torch.int32) for n in (lengths, key_lengths)
            ]
            self._flash = (index, ends[0], ends[1], max(lengths), max(key_lengths))
        return self._flash


@lru_cache
def flash_call() -> Callable | None:
    """A variable-length flash attention `f(q, k, v, cu_q, cu_k, max_q, max_k, scale, window)`; None where none is."""
    try:
        from flash_attn import flash_attn_varlen_func

        def with_flash_attn(q, k, v, cu_q, cu_k, max_q, max_k, scale, window):
            sides = (-1, -1) if window is None else (window - 1, 0)
            return flash_attn_varlen_func(
                q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=scale, causal=True, window_size=sides
            )

        return with_flash_attn
    except ImportError:
        pass
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    if "enable_gqa" not in inspect.signature(varlen_attn).parameters:  # of an older torch
        return None

    def with_torch(q, k, v, cu_q, cu_k, max_q, max_k, scale, window):
        sides = (-1, 0) if window is None else (window - 1, 0)
        return varlen_attn(
            q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=sides, enable_gqa=q.shape[1] != k.shape[1]
        )

    return with_torch


@torch.compiler.disable
def packed_attention(
    module: nn.Module,
    query: Tensor,  # [1, Q, N, D]
    key: Tensor,  # [1, R, N, D]
    value: Tensor,  # [1, R, N, D]
    attention_mask: Tensor | None,
    *,
    layout: Layout | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = NOT_GIVEN,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention of a packed batch ([1, N, Q, D]); without a `layout`, transformers' sdpa attention.

    Raises RuntimeError for what a packed batch does not carry: bidirectional layers, keywords of another meaning.
    """
    if softcap is None and s_aux is None:
        query, scaling = _scaled_first(query, scaling)
    if layout is None:
        if softcap is not None or s_aux is not None:
            if attention_mask is None:
                attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
                attention_mask = attention_mask.tril(key.shape[2] - query.shape[2])[None, None]
            out = _explicit(query, key, value, attention_mask[..., : key.shape[2]], scaling, softcap, s_aux, dropout)
            return out.transpose(1, 2).contiguous(), None
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if kwargs.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise RuntimeError(f"{type(module).__name__} is not causal")
    for name, given in kwargs.items():  # position biases, keys chosen by an indexer (DeepSeek-V3.2), ...
        if isinstance(given, Tensor) and name not in ("position_ids", "cache_position"):
            raise RuntimeError(f"{type(module).__name__} calls its attention with {name}")
    layout.calls += 1
    window = _window(module, sliding_window)
    if torch.is_autocast_enabled(query.device.type):  # fp32 norms leave queries and keys wider than autocast's dtype
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [N, heads, D]

    flash = flash_call() if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] <= 256 else None
    if flash and softcap is None and s_aux is None and not dropout:
        index, cu_q, cu_k, max_q, max_k = layout.flash()
        if index is not None:
            k, v = k.index_select(0, index), v.index_select(0, index)
        out = flash(q.contiguous(), k.contiguous(), v.contiguous(), cu_q, cu_k, max_q, max_k, scaling, window)
        return out[None], None

    buckets, query_index, key_index, place = layout.buckets()
    # index_select and not q[...]: on a CPU the gradient of the latter adds up in an order that differs between runs
    q_parts = q.index_select(0, query_index).split([b.queries.numel() for b in buckets])
    sizes = [b.keys.numel() for b in buckets]
    k_parts, v_parts = (x.index_select(0, key_index).split(sizes) for x in (k, v))
    outs = []
    for number, bucket in enumerate(buckets):
        shape = (*bucket.queries.shape, *q.shape[1:])
        bq = q_parts[number].view(shape).transpose(1, 2)  # [b, Q, Lq, D]
        bk = k_parts[number].view(*bucket.keys.shape, *k.shape[1:]).transpose(1, 2)  # [b, R, Lk, D]
        bv = v_parts[number].view(*bucket.keys.shape, *v.shape[1:]).transpose(1, 2)
        plain = bucket.causal and (window is None or window >= shape[1])
        if softcap is not None or s_aux is not None:
            out = _explicit(bq, bk, bv, layout.bucket_mask(number, window), scaling, softcap, s_aux, dropout)
        else:
            mask = None if plain else layout.bucket_mask(number, window)
            out = F.scaled_dot_product_attention(
                bq,
                bk,
                bv,
                attn_mask=mask,
                is_causal=plain,
                scale=scaling,
                dropout_p=dropout,
                enable_gqa=bq.shape[1] != bk.shape[1],
            )
        outs.append(out.transpose(1, 2).reshape(-1, q.shape[1], v.shape[-1]))
    flat = outs[0] if len(outs) == 1 else torch.cat(outs)
    return flat.index_select(0, place)[None], None


def _window(module: nn.Module, sliding_window: int | None) -> int | None:
    """The window of an attention call: what the call says, and the module's own only where the call has no such
    keyword (EXAONE-4 calls its global layers with None)."""
    return getattr(module, "sliding_window", None) if sliding_window is NOT_GIVEN else sliding_window


@contextmanager
def compare_masks(lengths: Tensor) -> Iterator[None]:
    """Inside, a plain forward of right-padded rows ([B] lengths) raises NotPackable where the mask that the model made
    is not the one that a packed batch gets from the attention call: causal, within the call's window.

    PhiMoE's window and Llama-4's chunks, for example, stand in their masks only.
    """

    def compared(module, query, key, value, attention_mask, **kwargs):
        tokens = torch.arange(query.shape[2], device=query.device)
        i, j, window = tokens[:, None], tokens[None, :], _window(module, kwargs.get("sliding_window", NOT_GIVEN))
        expected = j <= i if window is None else (j <= i) & (j > i - window)
        made = (j <= i)[None] if attention_mask is None else attention_mask[:, 0, :, : len(tokens)]
        made = made if made.dtype == torch.bool else made == 0
        if ((made != expected) & (i < lengths[:, None, None])).any():  # padding may look anywhere
            known = "" if window is None else f" within a window of {window}"
            raise NotPackable(f"the mask of {type(module).__name__} is not the causal one{known} of its attention call")
        return packed_attention(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(NAME, compared)
    try:
        yield
    finally:
        register_attention()


def _scaled_first(query: Tensor, scaling: float | None) -> tuple[Tensor, float | None]:
    """(queries, scale that is left): in float32 on a CPU the queries take the scale, as in vLLM's kernel there.

    SDPA multiplies the scores instead. Neither is closer to the exact result, but where the scale is no power of two
    they round differently, and trainer and sampler would be that far apart in every layer.
    """
    if query.device.type != "cpu" or query.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return query, scaling
    return query * (query.shape[-1] ** -0.5 if scaling is None else scaling), 1.0


def _explicit(q, k, v, mask, scaling, softcap, s_aux, dropout) -> Tensor:
    """Attention written out, for soft-caps (Gemma-2) and attention sinks (gpt-oss), which SDPA does not have."""
    repeats = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = scores.to(wide).masked_fill(~mask, torch.finfo(wide).min)
    if s_aux is not None:  # a learned logit per head that takes probability and gives nothing
        sink = s_aux.to(wide).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], dim=-1)
    probabilities = scores.softmax(dim=-1)[..., : k.shape[2]].to(q.dtype)
    return F.dropout(probabilities, dropout) @ v


def register_attention() -> str:
    """Make the function known to transformers; returns the name to set as `attn_implementation`."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME
