"""Settings of a rollout: how tokens are drawn (`Sampling`), and by which engine (`RolloutConfig`)."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field, fields
from typing import Any

import torch

ENGINES = ("auto", "transformers", "vllm", "vllm-server")
WEIGHT_SYNCS = ("auto", "full", "adapter")
WEIGHT_TRANSFERS = ("auto", "gloo", "nccl", "file")
VLLM_DTYPES = ("auto", "float32", "bfloat16", "float16")
TRUNCATIONS = {"top_p": 1.0, "top_k": 0, "min_p": 0.0}  # and the values that turn them off
STRUCTURED = ("structured_outputs_regex", "structured_outputs_json")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How one token is drawn and when a completion ends.

    Truncation follows transformers' order: the k most likely tokens, of those the smallest set that holds `top_p` of
    their mass (the most likely token always stays), of those the ones at least `min_p` times as likely as the best.
    """

    max_completion_length: int = 256
    """Tokens a completion may have, its stop token included."""
    temperature: float = 1.0
    """Sampling temperature; the same temperature scores the tokens. (0 is greedy: the most likely token, without
    truncations; for evaluation alone.)"""
    top_p: float = 1.0
    """Nucleus sampling mass; 1 is off."""
    top_k: int = 0
    """Sample from the k most likely tokens; 0 is off."""
    min_p: float = 0.0
    """Drop tokens less likely than min_p times the most likely one; 0 is off."""
    stop: list[str] = field(default_factory=list)
    """Strings that end a completion with the token that completes them (they stay in it)."""
    stop_token_ids: list[int] = field(default_factory=list)
    """Token ids that end a completion, besides the model's own stop tokens."""
    bad_words: list[str] = field(default_factory=list)
    """Words that are not sampled: the last token of each never follows the ones before it. They are tokenized as vLLM
    does (by themselves and after a space); other tokens may still spell them."""
    structured_outputs_regex: str | None = None
    """Regular expression that whole completions match, if they end by themselves (vLLM engines)."""
    structured_outputs_json: dict[str, Any] | None = None
    """JSON schema that completions follow, if they end by themselves (vLLM engines)."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}: set it to 0 (greedy) or above.")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p}: set it above 0 and at most 1 (1 is off).")
        if not 0.0 <= self.min_p < 1.0:
            raise ValueError(f"min_p is {self.min_p}: set it to at least 0 (off) and below 1.")
        _check_least(self, {"max_completion_length": 1, "top_k": 0})
        if "" in self.stop:
            raise ValueError("stop holds an empty string, which every completion contains: remove it.")
        if any(token < 0 for token in self.stop_token_ids):
            raise ValueError(f"stop_token_ids is {list(self.stop_token_ids)}: token ids are 0 or above.")
        if not all(word.strip() for word in self.bad_words):
            raise ValueError("bad_words holds a blank word: remove it.")
        structured = [key for key in STRUCTURED if getattr(self, key) is not None]
        if any(not getattr(self, key) for key in structured):
            raise ValueError(f"{structured[0]} is empty: leave it out, or say what completions have to be.")
        if len(structured) > 1 or structured and self.bad_words:
            both = ["bad_words", *structured][-2:]
            raise ValueError(f"{both[0]} and {both[1]} together can leave no token to draw: keep one of them.")

    @property
    def masks(self) -> list[str]:
        """Names of the options in force that keep tokens from being drawn, greedy sampling included."""
        return [key for key in ("bad_words", *STRUCTURED) if getattr(self, key)]

    @property
    def restrictions(self) -> list[str]:
        """Names of the options in force that keep tokens of the policy from being drawn: truncations and masks."""
        return [key for key, off in TRUNCATIONS.items() if getattr(self, key) != off] + self.masks

    def greedy(self) -> Sampling:
        """The same without chance: temperature 0."""
        values = {leaf.name: getattr(self, leaf.name) for leaf in fields(Sampling)}
        return Sampling(**{**values, "temperature": 0.0})


def _check_least(config: Any, least: dict[str, int]) -> None:
    """Raise ValueError for a value below its least one."""
    for key, value in least.items():
        if not getattr(config, key) >= value:
            raise ValueError(f"{key} is {getattr(config, key)}: set it to {value} or above.")


def resolve_engine(name: str) -> str:
    """What `auto` means on this machine; any other name is returned as it is."""
    if name != "auto":
        return name
    return "vllm" if importlib.util.find_spec("vllm") and torch.cuda.is_available() else "transformers"


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(Sampling):
    """How completions are sampled."""

    engine: str = "auto"
    """`transformers` (the policy's own weights), `vllm` (in this process), `vllm-server` (over HTTP), or auto
    (the default): vllm where it is installed and there is a GPU, else transformers. Everything else, the recorded
    settings too, sees what auto has chosen."""
    num_generations: int = 8
    """Completions per prompt: the group of GRPO."""
    max_decode_batch: int = 0
    """Completions decoded together by the transformers engine, to bound the memory of keys and values; 0 is all."""
    prefill_token_budget: int = 16384
    """Prompt tokens (padding included) in one forward of the transformers engine."""

    weight_sync: str = "auto"
    """What goes to vLLM after each step: `full` weights (adapters merged on the fly), the `adapter` alone (LoRA), or
    auto: the adapter on GPUs where vLLM can serve it, else full (on a CPU vLLM is slow with adapters)."""
    weight_transfer: str = "auto"
    """How full weights reach a server: `gloo` (network), `nccl` (other GPUs), `file` (a folder that both see), or auto:
    nccl where the servers have GPUs other than the trainer's, else gloo."""
    sync_dir: str | None = None
    """Folder that trainer and servers both see, for adapters and `weight_transfer: file`; default: a temporary one."""
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
        object.__setattr__(self, "engine", resolve_engine(self.engine))
        super().__post_init__()
        if self.temperature == 0:
            raise ValueError(
                f"temperature is 0, which makes all num_generations = {self.num_generations} completions of a prompt "
                "the same: set temperature above 0 (evaluation is greedy by itself)."
            )
        known = {"engine": ENGINES, "weight_sync": WEIGHT_SYNCS, "weight_transfer": WEIGHT_TRANSFERS}
        for key, allowed in {**known, "vllm_dtype": VLLM_DTYPES}.items():
            if getattr(self, key) not in allowed:
                raise ValueError(f"{key} is {getattr(self, key)!r}: set it to one of {', '.join(allowed)}.")
        ones = ("num_generations", "prefill_token_budget", "vllm_tensor_parallel_size", "vllm_max_num_seqs")
        zeros = ("max_decode_batch", "vllm_kv_cache_gib", "vllm_max_model_len", "server_port", "check_every")
        _check_least(self, dict.fromkeys((*ones, "num_servers"), 1))
        _check_least(self, dict.fromkeys((*zeros, "max_mismatch", "async_level"), 0))
        for key in ("server_timeout", "request_timeout"):
            if getattr(self, key) <= 0:
                raise ValueError(f"{key} is {getattr(self, key)}: set it to a number of seconds above 0.")
        if not 0.0 <= self.vllm_gpu_memory_utilization < 1.0:
            raise ValueError(
                f"vllm_gpu_memory_utilization is {self.vllm_gpu_memory_utilization}: set it to 0 (chosen) or below 1."
            )
        if "://" in (self.sync_dir or ""):
            raise ValueError(f"sync_dir is {self.sync_dir}: name a folder that trainer and servers both see.")
        if self.server_urls and (self.num_servers > 1 or self.server_port):
            key = "num_servers" if self.num_servers > 1 else "server_port"
            raise ValueError(f"{key} is for servers that the run starts, and server_urls names running ones: drop one.")
        for url in self.server_urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"server_urls holds {url!r}: write it as http://HOST:PORT.")
        if self.async_level and self.engine != "vllm-server":
            raise ValueError(
                f"async_level is {self.async_level} and engine {self.engine!r}, which samples where the policy trains: "
                "set engine to vllm-server, or async_level to 0."
            )
        if self.engine == "transformers":
            check_transformers_sampling(self)
        else:
            check_vllm_sampling(self)

    @property
    def vllm_in_process(self) -> bool:
        """Whether vLLM samples in the trainer's process, where its sleep needs memory that is not expandable."""
        return self.engine == "vllm"

    def check_due(self, step: int, *, first: bool) -> bool:
        """Whether the sampler's and the trainer's log-probabilities are compared in step `step`. Where sampling runs
        ahead only the very first one is of the weights that train on it."""
        if self.async_level:
            return step == 0
        return first or (self.check_every > 0 and step % self.check_every == 0)


def check_transformers_sampling(sampling: Sampling) -> None:
    """Raise ValueError for what the embedded engine does not do."""
    for key in sampling.masks:
        if key in STRUCTURED:
            raise ValueError(
                f"{key} is set, which the transformers engine does not do: set engine to vllm, or drop it."
            )


def check_vllm_sampling(sampling: Sampling) -> None:
    """Raise ValueError for what vLLM cannot sample, or not score, as `engine.Completion.logprobs` says.

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
