"""What every rollout engine takes and returns.

An engine turns prompts (token ids) into completions (token ids and their log-probabilities) under the policy's current
weights. The loops know no engine by its name: whether the tokens come from the policy's own module, from vLLM in the
same process or from a server is the engine's business, and what follows from it an attribute of the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

ENGINES = ("auto", "transformers", "vllm", "vllm-server")
WEIGHT_SYNCS = ("auto", "full", "adapter")
WEIGHT_TRANSFERS = ("auto", "gloo", "nccl", "ipc", "file")
VLLM_DTYPES = ("auto", "float32", "bfloat16", "float16")
STRUCTURED = ("structured_outputs_regex", "structured_outputs_json")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How one token is drawn and when a completion ends.

    Truncation follows transformers' order: the k most likely tokens, of those the smallest set that holds `top_p` of
    their mass (the most likely token always stays), of those the ones at least `min_p` times as likely as the best.
    """

    temperature: float = 1.0
    """Logits are divided by it; 0 takes the most likely token (greedy) and ignores the truncations."""
    top_p: float = 1.0
    """Nucleus mass in (0, 1]; 1 is off."""
    top_k: int = 0
    """Most likely tokens kept; 0 is off."""
    min_p: float = 0.0
    """Smallest probability kept, as a share of the best one, in [0, 1); 0 is off."""
    max_completion_length: int = 256
    """Tokens a completion may have, its stop token included."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion with the token that completes them; they stay in it."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end a completion, besides the model's and the tokenizer's own."""
    bad_words: tuple[str, ...] = ()
    """Strings whose last token is never drawn after the ones before it. They are tokenized as vLLM does: by themselves,
    and after a space where that has another first token and as many of them. Other tokens may spell them too."""
    structured_outputs_regex: str | None = None
    """Regular expression that a completion matches from its first to its last character, if it ends by itself."""
    structured_outputs_json: dict[str, Any] | None = None
    """JSON schema that a completion follows, if it ends by itself."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}: set it to 0 (greedy) or above.")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p}: set it above 0 and at most 1 (1 is off).")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}: set it to 0 (off) or to the number of tokens to keep.")
        if not 0.0 <= self.min_p < 1.0:
            raise ValueError(f"min_p is {self.min_p}: set it to at least 0 (off) and below 1.")
        if self.max_completion_length < 1:
            raise ValueError(f"max_completion_length is {self.max_completion_length}: set it to 1 or more tokens.")
        if "" in self.stop:
            raise ValueError("stop holds an empty string, which every completion contains: remove it.")
        if any(token < 0 for token in self.stop_token_ids):
            raise ValueError(f"stop_token_ids is {list(self.stop_token_ids)}: token ids are 0 or above.")
        for word in self.bad_words:
            if not word.strip():
                raise ValueError(f"bad_words holds {word!r}, which is blank: remove it.")
        structured = [key for key in STRUCTURED if getattr(self, key) is not None]
        if any(not getattr(self, key) for key in structured):
            raise ValueError(f"{structured[0]} is empty: leave it out, or say what completions have to be.")
        if len(structured) > 1:
            raise ValueError(f"{structured[0]} and {structured[1]} are both set: keep one of them.")
        if structured and self.bad_words:
            raise ValueError(
                f"bad_words and {structured[0]} together can leave no token to draw: keep one of them, and let it say "
                "everything."
            )

    @property
    def restrictions(self) -> list[str]:
        """Names of the options in force that keep tokens of the policy from being drawn."""
        keys = ("top_p", "top_k", "min_p", "bad_words", *STRUCTURED)
        return [key for key in keys if getattr(self, key) != getattr(Sampling, key)]

    @property
    def masks(self) -> list[str]:
        """Those of them that hold for greedy sampling too."""
        return [key for key in self.restrictions if key not in ("top_p", "top_k", "min_p")]


def check_call(
    prompts: list[list[int]],
    n: int,
    sampling: Sampling,
    prompt_numbers: list[int],
    *,
    tokenizer: Any,
    vocabulary: int,
    context: tuple[int | None, str],
) -> None:
    """Raise ValueError for arguments of `Engine.sample` that no engine can do; the model has `vocabulary` tokens.

    context: how many tokens a prompt and its completion may have together (None: any number), and what limits them.
    """
    if len(prompts) != len(prompt_numbers):
        raise ValueError(f"there are {len(prompts)} prompts and {len(prompt_numbers)} prompt_numbers: give one each.")
    if n < 1:
        raise ValueError(f"n is {n}: ask for 1 or more completions per prompt.")
    for place, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {place} (number {prompt_numbers[place]}) has no tokens: leave it out.")
        length, limit = sampling.max_completion_length, context[0]
        if limit is not None and len(prompt) + length > limit:
            raise ValueError(
                f"prompt {place} (number {prompt_numbers[place]}) has {len(prompt)} tokens, and with "
                f"max_completion_length {length} that is more than the {limit} {context[1]}."
            )
    for token in sampling.stop_token_ids:
        if token >= vocabulary:
            raise ValueError(f"stop_token_ids holds {token}, and the model has {vocabulary} tokens: correct it.")
    if sampling.stop and tokenizer is None:
        raise ValueError("stop strings need a tokenizer: give the engine one, or use stop_token_ids.")
    if sampling.masks and tokenizer is None:
        raise ValueError(f"{sampling.masks[0]} needs a tokenizer: give the engine one, or leave it out.")


def check_transformers_sampling(sampling: Sampling) -> None:
    """Raise ValueError for what the embedded engine does not do."""
    for key in sampling.masks:
        if key in STRUCTURED:
            raise ValueError(
                f"{key} is set, which the transformers engine does not do: set engine to vllm, or drop it."
            )


def check_vllm_sampling(sampling: Sampling) -> None:
    """Raise ValueError for what vLLM cannot sample, or not score, as the contract says.

    It reports log-probabilities either before everything that shapes the distribution, so at temperature 1, or after
    all of it, so renormalised over the tokens that are left: exact are restrictions at temperature 1, and other
    temperatures without restriction. It drops tokens below `min_p` first of all, and so has another nucleus.
    """
    restrictions = sampling.restrictions
    if restrictions and sampling.temperature not in (0, 1):
        way_out = "" if restrictions[-1] in STRUCTURED else ", or set engine to transformers"
        raise ValueError(
            f"temperature is {sampling.temperature} and {restrictions[0]} {getattr(sampling, restrictions[0])}: vLLM "
            f"has no log-probabilities over the whole vocabulary for both; drop one{way_out}."
        )
    if sampling.min_p and sampling.top_p < 1:
        raise ValueError(
            "min_p and top_p together mean different tokens in vLLM: drop one, or set engine to transformers."
        )
    if 0 < sampling.temperature < 0.01:
        raise ValueError(
            f"temperature is {sampling.temperature}, which vLLM raises to 0.01: set it to 0.01 or above, or 0 (greedy)."
        )
    if sampling.temperature > 2:
        raise ValueError(f"temperature is {sampling.temperature}, and vLLM takes at most 2: set it to 2 or below.")


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How completions are sampled."""

    engine: str = "auto"
    """`transformers` (the policy's own weights), `vllm` (in this process), `vllm-server` (over HTTP), or auto: vllm
    where it is installed and there is a GPU, else transformers."""
    num_generations: int = 8
    """Completions per prompt: the group of GRPO."""
    max_completion_length: int = 256
    """Tokens a completion may have, its stop token included."""
    temperature: float = 1.0
    """Sampling temperature; the same temperature scores the tokens."""
    top_p: float = 1.0
    """Nucleus sampling mass; 1 is off."""
    top_k: int = 0
    """Sample from the k most likely tokens; 0 is off."""
    min_p: float = 0.0
    """Drop tokens less likely than min_p times the most likely one; 0 is off."""
    stop: list[str] = field(default_factory=list)
    """Strings that end a completion (they stay in it)."""
    stop_token_ids: list[int] = field(default_factory=list)
    """Token ids that end a completion, besides the model's own stop tokens."""
    bad_words: list[str] = field(default_factory=list)
    """Words that are not sampled: the last token of each never follows the ones before it."""
    structured_outputs_regex: str | None = None
    """Regular expression that whole completions match (vLLM engines)."""
    structured_outputs_json: dict[str, Any] | None = None
    """JSON schema that completions follow (vLLM engines)."""
    max_decode_batch: int = 0
    """Completions decoded together by the transformers engine, to bound the memory of keys and values; 0 is all."""
    prefill_token_budget: int = 16384
    """Prompt tokens (padding included) in one forward of the transformers engine."""

    weight_sync: str = "auto"
    """What goes to vLLM after each step: `full` weights (adapters merged on the fly), the `adapter` alone (LoRA), or
    auto: the adapter on GPUs where vLLM can serve it, else full (on a CPU vLLM is slow with adapters)."""
    weight_transfer: str = "auto"
    """How full weights reach a server: `gloo` (network), `nccl` (other GPUs), `ipc` (the same GPUs), `file` (a folder
    that both see), or auto: gloo on a CPU; on GPUs ipc for servers that the run starts on its own GPUs, else nccl."""
    sync_dir: str | None = None
    """Folder that trainer and servers both see, for adapters and `weight_transfer: file`; default: a temporary one. For
    files it may be in an object store (s3://BUCKET/PREFIX, gs://...), reached with the machine's credentials."""
    vllm_dtype: str = "auto"
    """Dtype in which vLLM serves: float32, bfloat16, float16, or auto: what the trainer computes in."""
    vllm_tensor_parallel_size: int = 1
    """GPUs (processes of this run, with `engine: vllm`) that share one copy of the model."""
    vllm_gpu_memory_utilization: float = 0.0
    """Share of a GPU's memory for vLLM; 0 is 0.3 beside the trainer (`engine: vllm`) and 0.9 for servers."""
    vllm_kv_cache_gib: float = 0.0
    """Memory for keys and values, in GiB; 0 is 0.25 on a CPU, and what is left of vLLM's share on a GPU."""
    vllm_max_model_len: int = 0
    """Tokens of prompt and completion together; 0 is what the model, or the memory for keys and values, allows."""
    vllm_max_num_seqs: int = 256
    """Completions that vLLM decodes at the same time."""
    vllm_sleep: bool = True
    """Free vLLM's GPU memory while the policy trains (`engine: vllm` on a GPU)."""
    server_urls: list[str] = field(default_factory=list)
    """Servers that are running already (`launch/vllm_server.py` starts one); none: the run starts its own. Their key,
    if any, is VLLM_API_KEY in the environment."""
    num_servers: int = 1
    """Servers that the run starts, on this machine, when `server_urls` is empty."""
    server_port: int = 0
    """Port of the first server that the run starts, the next ones follow; 0 takes free ones."""
    server_timeout: float = 300.0
    """Seconds that a server may take to start, and to take new weights."""
    request_timeout: float = 600.0
    """Seconds that a server may take for the completions of one prompt; then it counts as hung."""
    check_every: int = 50
    """Steps between two comparisons of the sampler's and the trainer's log-probabilities (the first step is always
    compared); 0 compares the first one only."""
    max_mismatch: float = 0.0
    """Difference of a token's log-probability, in nats, that only the worst thousandth of the tokens may exceed; 0
    chooses by dtype."""

    async_level: int = 0
    """Steps by which sampling may run ahead of training (`engine: vllm-server`): 0 waits for each step's own weights,
    n trains on samples of weights up to n updates old, corrected by `importance_sampling_cap`."""

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ValueError(f"engine is {self.engine!r}: set it to one of {', '.join(ENGINES)}.")
        if self.async_level < 0:
            raise ValueError(f"async_level is {self.async_level}: set it to 0 (off) or to a number of steps.")
        if self.async_level and self.engine != "vllm-server":
            raise ValueError(
                f"async_level is {self.async_level} and engine {self.engine!r}, which samples where the policy trains: "
                "set engine to vllm-server, or async_level to 0."
            )
        self._check_vllm()
        if self.num_generations < 1:
            raise ValueError(f"num_generations is {self.num_generations}: set it to 1 or more completions per prompt.")
        if self.temperature == 0:
            raise ValueError(
                f"temperature is 0, which makes all num_generations = {self.num_generations} completions of a prompt "
                "the same: set temperature above 0 (evaluation is greedy by itself)."
            )
        if self.max_decode_batch < 0:
            raise ValueError(f"max_decode_batch is {self.max_decode_batch}: set it to 0 (all) or above.")
        if self.prefill_token_budget < 1:
            raise ValueError(f"prefill_token_budget is {self.prefill_token_budget}: set it to 1 or more tokens.")
        sampling = self.sampling()
        if self.engine == "transformers":
            check_transformers_sampling(sampling)

    def _check_vllm(self) -> None:
        known = {"weight_sync": WEIGHT_SYNCS, "weight_transfer": WEIGHT_TRANSFERS, "vllm_dtype": VLLM_DTYPES}
        for key, allowed in known.items():
            if getattr(self, key) not in allowed:
                raise ValueError(f"{key} is {getattr(self, key)!r}: set it to one of {', '.join(allowed)}.")
        for key in ("vllm_tensor_parallel_size", "vllm_max_num_seqs", "num_servers"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}: set it to 1 or more.")
        for key in ("vllm_kv_cache_gib", "vllm_max_model_len", "server_port", "check_every", "max_mismatch"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key} is {getattr(self, key)}: set it to 0 or above.")
        for key in ("server_timeout", "request_timeout"):
            if getattr(self, key) <= 0:
                raise ValueError(f"{key} is {getattr(self, key)}: set it to a number of seconds above 0.")
        if not 0.0 <= self.vllm_gpu_memory_utilization < 1.0:
            raise ValueError(
                f"vllm_gpu_memory_utilization is {self.vllm_gpu_memory_utilization}: set it to 0 (chosen) or below 1."
            )
        if self.server_urls and (self.num_servers > 1 or self.server_port):
            key = "num_servers" if self.num_servers > 1 else "server_port"
            raise ValueError(f"{key} is for servers that the run starts, and server_urls names running ones: drop one.")
        for url in self.server_urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"server_urls holds {url!r}: write it as http://HOST:PORT.")
        if self.engine in ("vllm", "vllm-server"):
            check_vllm_sampling(self.sampling())

    def check_due(self, step: int, *, first: bool) -> bool:
        """Whether the sampler's and the trainer's log-probabilities are compared in step `step`. Where sampling runs
        ahead only the very first one is of the weights that train on it."""
        if self.async_level:
            return step == 0
        return first or (self.check_every > 0 and step % self.check_every == 0)

    def sampling(self) -> Sampling:
        """The sampling of training rollouts; `dataclasses.replace(..., temperature=0)` makes it greedy.

        Raises ValueError: a value is out of its range.
        """
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            max_completion_length=self.max_completion_length,
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            bad_words=tuple(self.bad_words),
            structured_outputs_regex=self.structured_outputs_regex,
            structured_outputs_json=self.structured_outputs_json,
        )


@dataclass(frozen=True)
class Completion:
    """One sampled continuation of a prompt."""

    token_ids: list[int]
    """Sampled tokens; the stop token is the last one when the model stopped by itself, a truncated one has none."""
    logprobs: list[float]
    """log softmax(logits / temperature) of each sampled token in at least fp32, over the whole vocabulary: without
    top-p, top-k, min-p, bad words and structured outputs, so that it is what the trainer scores. Greedy sampling
    reports temperature 1."""
    finish_reason: Literal["stop", "length"]
    """`stop`: a stop token or stop string came; `length`: cut at `max_completion_length`."""
    text: str
    """The decoded tokens, special tokens left out (no tokenizer: empty)."""
    weight_version: int
    """The engine's weight version that sampled it: the oldest one, where weights changed on the way."""


@dataclass(frozen=True, kw_only=True)
class SyncReport:
    """What one weight update moved."""

    weight_version: int  # version of the weights that serve from now on; it grows by one with each sync
    tensors: int  # named tensors sent; 0 where the engine samples from the policy itself
    bytes: int  # bytes sent
    seconds: float  # wall time from the call until the new weights serve


Arrived = Callable[[int, list[Completion]], None]  # takes the place of a prompt and its n completions


class Engine(Protocol):
    """A sampler of completions that follows the policy's weights."""

    weight_version: int  # version of the weights that serve; 0 before the first sync
    off_policy: bool  # whether tokens come from other kernels, or older weights, than those that train on them

    def sync(self, policy: torch.nn.Module) -> SyncReport:
        """Makes the engine serve the policy's present weights, and nothing older.

        Raises ValueError: the policy does not fit the engine's model.
        """
        ...

    def sample(
        self,
        prompts: list[list[int]],
        *,
        n: int,
        sampling: Sampling,
        seed: int,
        prompt_numbers: list[int],
        arrived: Arrived | None = None,
    ) -> list[list[Completion]]:
        """Samples n completions of each prompt.

        Args:
            prompts: P prompts as token ids, at least one token each.
            n: completions per prompt.
            sampling: how tokens are drawn and when a completion ends.
            seed: with `prompt_numbers`, the only source of chance: the noise of a token depends on (seed, prompt
                number, completion 0..n-1, position in the completion), never on the batch or the rank.
            prompt_numbers: P integers that name the prompts, the same on every rank that could draw them.
            arrived: called once for each prompt, in the caller's thread while others are sampled, by engines that
                finish prompts one by one; others, which have all of them at once, do not call it.

        Returns:
            P lists of n completions, in the order of `prompts`.

        Raises ValueError: no prompt numbers for some prompts, or an empty prompt.
        """
        ...

    def rest(self) -> None:
        """Nothing is sampled until the next sync: memory that can be given back is."""
        ...

    def close(self) -> None:
        """Ends what the engine started: servers, processes, temporary files."""
        ...
