"""How a model is served, and the two serving containers: which image, and which variables mean this to each.

vllm: AWS's vLLM image, vLLM's own server; `SM_VLLM_A_B=v` becomes `--a-b v`. lmi: AWS's Large Model Inference image,
vLLM inside DJL Serving; `OPTION_A=v` is vLLM's engine argument. LMI runs vLLM's asynchronous engine; its older mode,
rolling batch (`OPTION_ROLLING_BATCH=vllm`), is not set here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from launch.sagemaker.checks import check_environment
from launch.sagemaker.instances import gpus_of

IMAGES = {"vllm": {"framework": "vllm", "version": "0.30.0"}, "lmi": {"framework": "djl-lmi", "version": "0.38.0"}}
AMI = "al2023-ami-sagemaker-inference-gpu-4-1"  # driver 580: the images are built for CUDA 13.0
MODEL = "/opt/ml/model"


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to serve, and where."""

    name: str = ""
    """Name of endpoint, model and served model; left out, plumbline and the time."""
    instance_type: str = "ml.g6e.2xlarge"
    """Kind of machine; the default has one L40S of 48 GB."""
    instance_count: int = 1
    """Machines, each with a copy of the model."""
    container: str = "vllm"
    """vllm or lmi."""
    base_model: str | None = None
    """Where the model is an adapter: the hub id of its base; left out, what the adapter's config names."""
    lora_rank: int = 0
    """Rank of the adapter; left out, it is read from the adapter's config."""
    quantization: str | None = None
    """fp8 quantises 16-bit weights when the server starts."""
    tensor_parallel: int = 0
    """GPUs that hold one copy of the model; left out, all of a machine."""
    max_model_len: int | None = None
    """Context length: tokens of prompt and completion together."""
    tool_call_parser: str | None = None
    """vLLM's parser of the model's tool calls: hermes (Qwen), llama3_json, mistral, ..."""
    environment: dict[str, str] = field(default_factory=dict)
    """Further variables of the container, NAME=VALUE: SM_VLLM_... or OPTION_..., over ours."""
    tags: dict[str, str] = field(default_factory=dict)
    """Tags of the endpoint, NAME=VALUE."""
    subnets: list[str] = field(default_factory=list)
    """VPC subnets of the model."""
    security_group_ids: list[str] = field(default_factory=list)
    """VPC security groups of the model."""
    image: str | None = None
    """Your own serving image; left out, AWS's image of the region."""
    ami: str = AMI
    """Machine image: its driver has to fit the container's CUDA."""

    def __post_init__(self) -> None:
        if self.container not in IMAGES:
            raise ValueError(f"container is `{self.container}`; give vllm or lmi.")
        count = gpus_of(self.instance_type)
        if count == 0:
            raise ValueError(f"instance_type {self.instance_type} has no GPU, and the containers need one.")
        if count is None and not self.tensor_parallel:
            raise ValueError(f"how many GPUs {self.instance_type} has is not known here: give tensor_parallel.")
        if count and self.tensor_parallel > count:
            raise ValueError(f"tensor_parallel is {self.tensor_parallel} and {self.instance_type} has {count} GPU(s).")
        check_environment(self.environment)

    @property
    def parallel(self) -> int:
        """GPUs that hold one copy of the model."""
        return self.tensor_parallel or gpus_of(self.instance_type) or 1


def container_environment(options: Options, adapter: str = MODEL) -> dict[str, str]:
    """The container's variables. `adapter`: its folder, where `lora_rank` says that the model is one.

    An adapter has the endpoint's name, and its base NAME-base. LMI loads it from `adapters/NAME` of the mounted model.
    """
    vllm = options.container == "vllm"
    values: dict[str, Any] = {
        "SERVED_MODEL_NAME": f"{options.name}-base" if options.lora_rank else options.name,
        "MAX_MODEL_LEN": options.max_model_len,
        "QUANTIZATION" if vllm else "QUANTIZE": options.quantization,
        "TOOL_CALL_PARSER": options.tool_call_parser,
        "ENABLE_AUTO_TOOL_CHOICE": "true" if options.tool_call_parser else None,
    }
    if options.lora_rank:
        from loops.shared.adapters import served_rank  # imports torch

        values |= {"ENABLE_LORA": "true", "MAX_LORA_RANK": served_rank(options.lora_rank)}
    found = {}
    if vllm:
        values["TENSOR_PARALLEL_SIZE"] = options.parallel
        if options.lora_rank:
            values |= {
                "MODEL": options.base_model,
                "LORA_MODULES": json.dumps([{"name": options.name, "path": adapter}]),
                "MIDDLEWARE": "serve_adapter.ServeAdapter",  # the base would answer without it; see that file
            }
            found = {"PYTHONPATH": adapter, "PLUMBLINE_ADAPTER": options.name}
    else:
        found = {"HF_MODEL_ID": options.base_model or MODEL, "TENSOR_PARALLEL_DEGREE": str(options.parallel)}
    prefix = "SM_VLLM" if vllm else "OPTION"
    return found | {f"{prefix}_{name}": str(value) for name, value in values.items() if value is not None}
