"""Bad words and structured outputs in vLLM: checked before anything is sent, scored over the whole vocabulary."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace
from typing import Any

import torch

from loops.shared.rollout.config import STRUCTURED, Sampling
from loops.shared.rollout.sampling import bad_word_tokens

_MAX_SEQUENCES, _MAX_TOKENS = 128, 1024  # of all bad words together, in vLLM


def structured_outputs(sampling: Sampling) -> dict[str, Any]:
    """The argument of vLLM's StructuredOutputsParams; empty where nothing is asked for."""
    return {
        key.removeprefix("structured_outputs_"): getattr(sampling, key) for key in STRUCTURED if key in sampling.masks
    }


def check_masks(sampling: Sampling, tokenizer: Any, *, device: str) -> None:
    """Raise ValueError for bad words and structured outputs that vLLM does not take."""
    lengths = [len(sequence) for sequence in bad_word_tokens(sampling.bad_words, tokenizer)]
    if len(lengths) > _MAX_SEQUENCES or sum(lengths) > _MAX_TOKENS:
        raise ValueError(
            f"bad_words are {len(lengths)} token sequences with {sum(lengths)} tokens, and vLLM takes {_MAX_SEQUENCES} "
            f"with {_MAX_TOKENS}: shorten the list, or set engine to transformers."
        )
    for kind, value in structured_outputs(sampling).items():
        if importlib.util.find_spec("vllm"):  # where all servers are elsewhere, they refuse it
            _check_grammar(kind, value, on_gpu=device == "cuda")


def _check_grammar(kind: str, value: Any, *, on_gpu: bool) -> None:
    import vllm.envs
    from vllm.sampling_params import SamplingParams, StructuredOutputsParams
    from vllm.v1.structured_output.backend_xgrammar import validate_xgrammar_grammar

    if on_gpu and vllm.envs.VLLM_USE_V2_MODEL_RUNNER is not False:
        raise ValueError(
            f"structured_outputs_{kind} on a GPU needs vLLM's first model runner, whose log-probabilities can be had "
            "over the whole vocabulary: set the environment variable VLLM_USE_V2_MODEL_RUNNER=0 (for servers of your "
            "own too)."
        )
    try:
        validate_xgrammar_grammar(SamplingParams(structured_outputs=StructuredOutputsParams(**{kind: value})))
    except Exception as error:  # vLLM's own classes are no ValueError
        reason = re.sub(r"\[[\d:]+\] \S+:\d+: ", "", " ".join(str(error).split()))  # of xgrammar's source
        raise ValueError(f"structured_outputs_{kind} cannot be used, change it: {reason[:300]}") from error


def score_before_masking() -> None:
    """Make vLLM's model runner take log-probabilities before a grammar's mask is applied, as it does with other masks.
    Called in every process that samples; calling it again changes nothing.

    vLLM writes the mask into the logits, so that log-probabilities are renormalised over the few tokens that it leaves;
    the trainer's are over all. Here it goes the way of `allowed_token_ids`: the sampler applies it after scoring.
    """
    from vllm.v1.sample.sampler import Sampler
    from vllm.v1.worker import gpu_model_runner

    write_mask, forward = gpu_model_runner.apply_grammar_bitmask, Sampler.forward
    if write_mask.__module__ == __name__:
        return

    def keep_mask(scheduler_output: Any, grammar_output: Any, input_batch: Any, logits: torch.Tensor) -> None:
        mask = torch.zeros_like(logits, dtype=torch.float32)
        write_mask(scheduler_output, grammar_output, input_batch, mask)
        logits.masked_by_grammar = mask.isinf()  # type: ignore[attr-defined]

    def score_first(self: Any, logits: torch.Tensor, sampling_metadata: Any, *rest: Any, **named: Any) -> Any:
        mask = getattr(logits, "masked_by_grammar", None)
        if mask is not None:
            sampling_metadata = replace(sampling_metadata, allowed_token_ids_mask=mask)
        return forward(self, logits, sampling_metadata, *rest, **named)

    gpu_model_runner.apply_grammar_bitmask, Sampler.forward = keep_mask, score_first
