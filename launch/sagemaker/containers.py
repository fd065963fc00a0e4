"""The two serving containers: which image, and which variables say the same things to each.

vllm: AWS's vLLM image, vLLM's own server; `SM_VLLM_A_B=v` becomes `--a-b v`. lmi: AWS's Large Model Inference image,
vLLM inside DJL Serving; `OPTION_A=v` is vLLM's engine argument. LMI runs vLLM's asynchronous engine; its rolling batch
(`OPTION_ROLLING_BATCH=vllm`) is the mode of before, and is not set here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

IMAGES = {"vllm": {"framework": "vllm", "version": "0.30.0"}, "lmi": {"framework": "djl-lmi", "version": "0.38.0"}}
AMI = "al2023-ami-sagemaker-inference-gpu-4-1"  # driver 580: the images are built for CUDA 13.0
MODEL = "/opt/ml/model"
ADDITIONAL = "/opt/ml/additional-model-data-sources"
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has room for


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How a model is served; the same for both containers."""

    name: str
    """Name of the endpoint, and of what it serves: the model, or the adapter, whose base is then NAME-base."""
    tensor_parallel: int
    """GPUs that hold one copy of the model."""
    max_model_len: int | None = None
    """Tokens of prompt and completion together; None is the model's own limit."""
    quantization: str | None = None
    """fp8 quantises 16-bit weights when the server starts; None takes them as they are."""
    tool_call_parser: str | None = None
    """vLLM's parser of the model's tool calls (hermes, llama3_json, mistral, ...); None leaves calls in the text."""
    base_model: str | None = None
    """With an adapter: the base, a hub id, or MODEL where it is mounted."""
    lora_rank: int = 0
    """Rank of the adapter; 0 serves a whole model."""
    adapter: str = MODEL
    """Folder of the adapter in the container."""


def vllm_environment(serving: Serving) -> dict[str, str]:
    """Variables of AWS's vLLM image."""
    options, beside = {**_options(serving, "QUANTIZATION"), "TENSOR_PARALLEL_SIZE": serving.tensor_parallel}, {}
    if serving.lora_rank:
        options |= {
            "MODEL": serving.base_model,
            "LORA_MODULES": json.dumps([{"name": serving.name, "path": serving.adapter}]),
            "MIDDLEWARE": "serve_adapter.ServeAdapter",  # the base would answer without it; see that file
        }
        beside = {"PYTHONPATH": serving.adapter, "PLUMBLINE_ADAPTER": serving.name}
    return {f"SM_VLLM_{name}": str(value) for name, value in options.items() if value is not None} | beside


def lmi_environment(serving: Serving) -> dict[str, str]:
    """Variables of AWS's LMI image. It loads adapters from `adapters/NAME` of the mounted model."""
    options = _options(serving, "QUANTIZE")
    return {
        "HF_MODEL_ID": serving.base_model or MODEL,
        "TENSOR_PARALLEL_DEGREE": str(serving.tensor_parallel),
        **{f"OPTION_{name}": str(value) for name, value in options.items() if value is not None},
    }


def _options(serving: Serving, quantization: str) -> dict[str, Any]:
    """What both images call alike; `quantization` is the image's word for it."""
    options: dict[str, Any] = {
        "SERVED_MODEL_NAME": f"{serving.name}-base" if serving.lora_rank else serving.name,
        "MAX_MODEL_LEN": serving.max_model_len,
        quantization: serving.quantization,
        "TOOL_CALL_PARSER": serving.tool_call_parser,
        "ENABLE_AUTO_TOOL_CHOICE": "true" if serving.tool_call_parser else None,
    }
    if serving.lora_rank:
        options |= {"ENABLE_LORA": "true", "MAX_LORA_RANK": room_for(serving.lora_rank)}
    return options


ENVIRONMENTS = {"vllm": vllm_environment, "lmi": lmi_environment}


def room_for(rank: int) -> int:
    """The smallest rank that vLLM can be told which holds this one. Raises ValueError above the largest."""
    for room in LORA_RANKS:
        if rank <= room:
            return room
    raise ValueError(f"the adapter's rank is {rank} and vLLM serves {LORA_RANKS[-1]} at most: merge it into its base.")
