"""The policy's weights on their way into vLLM, both ends: the trainer's, and the back ends that vLLM's workers load.

A full update speaks vLLM's native protocol: init_weight_transfer_engine once, then start_weight_update, update_weights
for each bucket, finish_weight_update. What travels in these calls are plain dicts; the tensors go beside them. vLLM
finds the workers' end through the entry point `vllm.general_plugins` (`register`), in every process that it starts.

Transports: `direct` (the same process), `gloo` (network, CPU), `nccl` (other GPUs), `ipc` (the same GPU), `file`.
"""

from __future__ import annotations

import base64
import json
import pickle
import socket
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from loops.shared.models import ADAPTER, reshard
from loops.shared.rollout.masks import score_before_masking
from loops.shared.weights import iter_weights

Bucket = list[tuple[str, Tensor]]

BUCKET_BYTES = 512 * 2**20
# Adapter ranks that vLLM has kernels for.
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_PREFIX = "plumbline-"


class Control(Protocol):
    """One engine's end of the protocol: method names of vLLM's, over HTTP or in process."""

    def __call__(self, method: str, **arguments: Any) -> None: ...


# ---- what is sent ----------------------------------------------------------------------------------------------------


def unwrapped(policy: nn.Module) -> nn.Module:
    """The policy without the wrapper of data-parallel training."""
    while isinstance(policy, nn.parallel.DistributedDataParallel):
        policy = policy.module
    return policy


def unserved_adapter(policy: nn.Module) -> str | None:
    """Why vLLM cannot serve the policy's adapter by itself; None where it can."""
    from peft import LoraConfig, PeftModel
    from peft.tuners.lora import LoraLayer

    if not isinstance(policy, PeftModel):
        return "the policy has no adapter"
    lora = policy.peft_config[ADAPTER]
    if not isinstance(lora, LoraConfig):
        return f"{type(lora).__name__} is not LoRA"
    if lora.use_dora:
        return "vLLM does not serve DoRA (use_dora)"
    if lora.modules_to_save:
        return f"modules_to_save trains {', '.join(sorted(lora.modules_to_save))} whole"
    if lora.rank_pattern or lora.alpha_pattern or lora.bias != "none" or getattr(lora, "lora_bias", False):
        return "the adapter has ranks, scales or biases of its own for some modules"
    if lora.r > LORA_RANKS[-1]:
        return f"lora_r is {lora.r} and vLLM serves at most {LORA_RANKS[-1]}"
    ends = {id(policy.get_input_embeddings()), id(policy.get_output_embeddings())}
    for name, module in policy.named_modules():
        if isinstance(module, LoraLayer) and (id(module) in ends or module.lora_embedding_A):
            return f"the adapter covers {name.rsplit('.', 1)[-1]}"
    return None


def buckets(tensors: Iterable[tuple[str, Tensor]], limit: int = BUCKET_BYTES) -> Iterator[Bucket]:
    """Tensors in their order, as many at a time as `limit` bytes hold (one at least)."""
    bucket: Bucket = []
    size = 0
    for name, tensor in tensors:
        if bucket and size + tensor.nbytes > limit:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor.contiguous()))
        size += tensor.nbytes
    if bucket:
        yield bucket


def base_weights(policy: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """`iter_weights` of the base alone: what an adapter is added to, dequantised where it is quantised."""
    from peft.tuners.lora import LoraLayer

    layers = [module for module in policy.modules() if isinstance(module, LoraLayer)]
    scales = [layer.scaling[ADAPTER] for layer in layers]
    try:
        for layer in layers:
            layer.scaling[ADAPTER] = 0.0
        yield from iter_weights(policy, dtype=dtype)
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scaling[ADAPTER] = scale


def write_adapter(policy: Any, folder: Path, *, writes: bool) -> tuple[int, int]:
    """The adapter as vLLM reads it, in `folder`; returns (tensors, bytes).

    Every rank calls this, since shards are gathered by all; only one of them `writes`.
    """
    from safetensors.torch import save_file
    from torch.distributed.tensor import DTensor

    reshard(policy)
    tensors: dict[str, Tensor] = {}
    for name, parameter in policy.named_parameters():
        if f".{ADAPTER}." not in name or "lora_" not in name:
            continue
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        plain = [part for part in name.split(".") if part not in (ADAPTER, "_checkpoint_wrapped_module", "_orig_mod")]
        tensors[".".join(plain)] = whole.detach().cpu().contiguous() if writes else whole
    if writes:
        folder.mkdir(parents=True)
        lora = policy.peft_config[ADAPTER]
        names = lora.target_modules
        settings = {
            "peft_type": "LORA",
            "r": lora.r,
            "lora_alpha": lora.lora_alpha,
            "use_rslora": lora.use_rslora,
            "target_modules": names if isinstance(names, str) else sorted(names),
            "bias": "none",
        }
        (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return len(tensors), sum(tensor.nbytes for tensor in tensors.values())


# ---- the trainer's end -----------------------------------------------------------------------------------------------


def describe(bucket: Bucket) -> dict[str, list]:
    """Names, dtypes and shapes of a bucket as they travel in `update_weights`."""
    return {
        "names": [name for name, _ in bucket],
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
        "shapes": [list(tensor.shape) for _, tensor in bucket],
    }


class DirectTransport:
    """The same process: the tensors themselves ride in the call."""

    backend = _PREFIX + "direct"

    def open(self, control: Control, world_size: int) -> None:
        control("init_weight_transfer_engine", init_info={})

    def send(self, control: Control, bucket: Bucket) -> None:
        control("update_weights", update_info={"weights": bucket})

    def close(self) -> None:
        pass


class FileTransport:
    """Safetensors in a folder that both ends see: slow, and works everywhere."""

    backend = _PREFIX + "file"

    def __init__(self, folder: Path):
        self._file = folder / "weights.safetensors"

    def open(self, control: Control, world_size: int) -> None:
        control("init_weight_transfer_engine", init_info={})

    def send(self, control: Control, bucket: Bucket) -> None:
        from safetensors.torch import save_file

        self._file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.cpu() for name, tensor in bucket}, self._file)
        control("update_weights", update_info={"path": str(self._file)})

    def close(self) -> None:
        self._file.unlink(missing_ok=True)


class BroadcastTransport:
    """A process group of this process (rank 0) and an engine's workers, over gloo or NCCL."""

    def __init__(self, kind: str, *, host: str, timeout: float):
        self.backend = _PREFIX + kind
        self._kind, self._host, self._timeout = kind, host, timeout
        self._group: Any = None

    def open(self, control: Control, world_size: int) -> None:
        self.close()
        with _meanwhile() as start:
            if self._kind == "gloo":
                store = torch.distributed.TCPStore(
                    self._host, 0, world_size + 1, is_master=True, wait_for_workers=False, timeout=_span(self._timeout)
                )
                rendezvous = {"master_address": self._host, "master_port": store.port, "world_size": world_size + 1}
                answer = start(
                    control, "init_weight_transfer_engine", init_info={**rendezvous, "timeout": self._timeout}
                )
                self._group = _gloo_group(store, 0, world_size + 1, self._timeout)
            else:
                from vllm.distributed.weight_transfer.nccl_common import trainer_init

                rendezvous = {
                    "master_address": self._host,
                    "master_port": free_port(),
                    "world_size": world_size + 1,
                }
                answer = start(
                    control, "init_weight_transfer_engine", init_info={**rendezvous, "rank_offset": 1, "packed": False}
                )
                self._group = trainer_init(rendezvous)
            answer.result()

    def send(self, control: Control, bucket: Bucket) -> None:
        with _meanwhile() as start:  # the workers answer once they have received everything
            answer = start(control, "update_weights", update_info=describe(bucket))
            for _, tensor in bucket:
                if answer.done():  # refused before anything was received: nobody would take the rest
                    break
                if self._kind == "gloo":
                    _broadcast(self._group, tensor.cpu())
                else:
                    self._group.broadcast(
                        tensor.to(torch.cuda.current_device()), src=0, stream=torch.cuda.current_stream()
                    )
            answer.result()

    def close(self) -> None:
        if self._group is not None and self._kind == "nccl":
            self._group.destroy()
        self._group = None


class IpcTransport:
    """CUDA memory of this process, opened by workers on the same GPU."""

    backend = _PREFIX + "ipc"

    def open(self, control: Control, world_size: int) -> None:
        control("init_weight_transfer_engine", init_info={"packed": False})

    def send(self, control: Control, bucket: Bucket) -> None:
        from torch.multiprocessing.reductions import reduce_tensor

        gpu = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        shared = [(name, tensor.cuda()) for name, tensor in bucket]  # kept until the workers have copied
        handles = [{gpu: reduce_tensor(tensor)[1]} for _, tensor in shared]
        pickled = base64.b64encode(pickle.dumps(handles)).decode()
        control("update_weights", update_info={**describe(shared), "ipc_handles_pickled": pickled})
        torch.cuda.ipc_collect()

    def close(self) -> None:
        pass


def give_up(control: Control) -> None:
    """Ends an update whose finish was refused: vLLM takes no new one before, and ends it when an update fails."""
    try:
        control("update_weights", update_info={"given_up": True})
    except (ValueError, RuntimeError):
        return


Transport = DirectTransport | FileTransport | BroadcastTransport | IpcTransport


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on at present."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


@contextmanager
def _meanwhile() -> Iterator[Any]:
    """Starts a call in a thread. An error of the block does not wait for it: its other end may never answer."""
    pool = ThreadPoolExecutor(1)
    started: list[Future] = []

    def start(function: Control, method: str, **arguments: Any) -> Future:
        started.append(pool.submit(function, method, **arguments))
        return started[0]

    try:
        yield start
    except Exception as error:
        # The call's own error says more than the connection that broke because of it.
        for answer in wait(started, timeout=5).done:
            if answer.exception() is not None and answer.exception() is not error:
                raise answer.exception() from error
        raise
    finally:
        pool.shutdown(wait=False)


def _span(seconds: float) -> timedelta:
    return timedelta(seconds=seconds)


def _gloo_group(store: torch.distributed.Store, rank: int, world_size: int, timeout: float) -> Any:
    """A group of its own, beside the default one of the process."""
    prefixed = torch.distributed.PrefixStore("plumbline", store)
    return torch.distributed.ProcessGroupGloo(prefixed, rank, world_size, _span(timeout))


def _broadcast(group: Any, tensor: Tensor) -> None:
    """The tensor of rank 0, in place."""
    options = torch.distributed.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    group.broadcast([tensor], options).wait()


# ---- the workers' end ------------------------------------------------------------------------------------------------


def register() -> None:
    """Add the back ends to vLLM; the entry point of its plugins. Calling it again changes nothing."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    for kind, engine in _worker_engines().items():
        if _PREFIX + kind not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(_PREFIX + kind, engine)


def _worker_engines() -> dict[str, type]:
    """Back ends by name. Made here because vLLM is imported only where it is used."""
    from dataclasses import dataclass

    from vllm.distributed.weight_transfer.base import (
        WeightTransferEngine,
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )
    from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
    from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo, worker_init_process_group
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    class Checked:
        """vLLM's layerwise reload, which refuses an update that leaves parts of the model as they were."""

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            score_before_masking()
            if self.device.type == "cpu" and torch.cpu._is_amx_tile_supported():
                # Else the first bf16 forward of at most 4 tokens dies: vLLM has not asked for the tiles by then.
                torch.cpu._init_amx()

        def start_weight_update(self) -> None:
            initialize_layerwise_reload(self.model)

        def update_weights(self, update_info: dict[str, Any]) -> None:
            try:
                super().update_weights(update_info)
            except Exception:
                _abandon(self.model)
                raise

        def finish_weight_update(self) -> None:
            missing = _missing(self.model)
            if missing:
                _abandon(self.model)
                raise ValueError(f"the update left out weights of {', '.join(missing[:5])} ({len(missing)} modules).")
            finalize_layerwise_reload(self.model, self.model_config)
            head = getattr(self.model, "lm_head", None)
            if self.device.type == "cpu" and self.model_config.hf_text_config.tie_word_embeddings and head is not None:
                # On a CPU a tied head has a packed copy of the embeddings, which the reload does not renew.
                getattr(head, "base_layer", head).quant_method.process_weights_after_loading(
                    getattr(head, "base_layer", head)
                )

        def shutdown(self) -> None:
            pass

    @dataclass
    class Nothing(WeightTransferInitInfo):
        pass

    @dataclass
    class Tensors(WeightTransferUpdateInfo):
        weights: list

    class Direct(Checked, WeightTransferEngine):
        init_info_cls, update_info_cls = Nothing, Tensors

        def init_transfer_engine(self, init_info: Nothing) -> None:
            pass

        def receive_weights(self, update_info: Tensors) -> None:
            self.model.load_weights(update_info.weights)

    @dataclass
    class Safetensors(WeightTransferUpdateInfo):
        path: str

    class File(Checked, WeightTransferEngine):
        init_info_cls, update_info_cls = Nothing, Safetensors

        def init_transfer_engine(self, init_info: Nothing) -> None:
            pass

        def receive_weights(self, update_info: Safetensors) -> None:
            from safetensors import safe_open

            with safe_open(update_info.path, "pt") as file:
                self.model.load_weights((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118

    @dataclass
    class Rendezvous(WeightTransferInitInfo):
        master_address: str
        master_port: int
        world_size: int
        timeout: float

    @dataclass
    class Described(WeightTransferUpdateInfo):
        names: list
        dtype_names: list
        shapes: list

    class Broadcast(Checked, WeightTransferEngine):
        update_info_cls = Described
        group: Any = None

        def receive_weights(self, update_info: Described) -> None:
            received = self._received(update_info)
            try:
                self.model.load_weights(received)
            finally:
                for _ in received:  # the trainer sends all of them, also those after one that is refused
                    pass

        def _received(self, update_info: Described) -> Iterator[tuple[str, Tensor]]:
            described = zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True)
            for name, dtype, shape in described:
                yield name, self.receive(shape, getattr(torch, dtype))

    class Gloo(Broadcast):
        init_info_cls = Rendezvous

        def init_transfer_engine(self, init_info: Rendezvous) -> None:
            config = self.parallel_config
            rank = 1 + config.data_parallel_index * config.world_size + config.rank  # the trainer has 0
            store = torch.distributed.TCPStore(
                init_info.master_address, init_info.master_port, is_master=False, timeout=_span(init_info.timeout)
            )
            self.group = _gloo_group(store, rank, init_info.world_size, init_info.timeout)

        def receive(self, shape: list[int], dtype: torch.dtype) -> Tensor:
            tensor = torch.empty(shape, dtype=dtype, device="cpu")
            _broadcast(self.group, tensor)
            return tensor.to(self.device)

    class Nccl(Broadcast):
        init_info_cls = NCCLWeightTransferInitInfo

        def init_transfer_engine(self, init_info: NCCLWeightTransferInitInfo) -> None:
            self.group = worker_init_process_group(init_info, self.parallel_config)

        def receive(self, shape: list[int], dtype: torch.dtype) -> Tensor:
            tensor = torch.empty(shape, dtype=dtype, device=self.device)
            self.group.broadcast(tensor, src=0, stream=torch.cuda.current_stream())
            return tensor

        def shutdown(self) -> None:
            if self.group is not None:
                self.group.destroy()

    class Ipc(Checked, IPCWeightTransferEngine):
        def shutdown(self) -> None:
            self._packed_importer.close()

    return {"direct": Direct, "file": File, "gloo": Gloo, "nccl": Nccl, "ipc": Ipc}


def _abandon(model: nn.Module) -> None:
    """Put together again what an update that failed had taken apart.

    vLLM would count its tensors as part of the next update, and other engines in the process share some modules.
    """
    from vllm.model_executor.model_loader.reload.layerwise import _place_kernel_tensors, get_layerwise_info

    for module in model.modules():
        info = get_layerwise_info(module)
        if info.can_load() and info.kernel_tensors is not None:
            _place_kernel_tensors(module, info)
            info.reset()


def _missing(model: nn.Module) -> list[str]:
    """Modules that the update under way has not filled, by vLLM's names: none of their weights came, or only parts."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info, is_deferred_attention_layer

    embedded = {id(module) for module in model.modules() if isinstance(module, VocabParallelEmbedding)}
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    missing = []
    for name, module in model.named_modules():
        info = get_layerwise_info(module)
        own = [parameter for parameter in module.parameters(recurse=False)]
        if not info.can_load() or not own or is_deferred_attention_layer(module):
            continue  # filled, or nothing in it that a checkpoint has
        if id(module) in embedded and (info.load_numel or (tied and "lm_head" in name)):
            continue  # rows of padding never come, nor does a head that is the embedding
        missing.append(name)
    return missing
