"""The policy's weights on their way into vLLM, both ends: the trainer's, and the back ends that vLLM's workers load.

A full update speaks vLLM's native protocol: init_weight_transfer_engine once, then start_weight_update, update_weights
for each bucket, finish_weight_update. What travels in these calls are plain dicts; the tensors go beside them. vLLM
finds the workers' end through the entry point `vllm.general_plugins` (`register`), in every process that it starts. It
is one back end, `plumbline`; the trainer says in the first call which way the tensors take: `direct` (the same
process), `gloo` (network, CPU), `nccl` (other GPUs), `ipc` (the same GPU), `file`.
"""

from __future__ import annotations

import base64
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

from loops.shared.models import ADAPTER
from loops.shared.rollout.masks import score_before_masking
from loops.shared.weights import trained_tensors

Bucket = list[tuple[str, Tensor]]

BACKEND = "plumbline"
BUCKET_BYTES = 512 * 2**20
# Adapter ranks that vLLM has kernels for.
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


class Control(Protocol):
    """One engine's end of the protocol: method names of vLLM's, over HTTP or in process."""

    def __call__(self, method: str, **arguments: Any) -> None: ...


# ---- what is sent ----------------------------------------------------------------------------------------------------


def unwrapped(policy: nn.Module) -> nn.Module:
    """The policy without the wrapper of data-parallel training."""
    return policy.module if isinstance(policy, nn.parallel.DistributedDataParallel) else policy


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


def write_adapter(policy: Any, folder: Path, *, writes: bool) -> tuple[int, int]:
    """The adapter as vLLM reads it, in `folder`; returns (tensors, bytes).

    Every rank calls this, since shards are gathered by all; only one of them `writes`.
    """
    from safetensors.torch import save_file

    tensors = {name.replace(f".{ADAPTER}", ""): tensor.contiguous() for name, tensor in trained_tensors(policy, None)}
    if writes:
        policy.peft_config[ADAPTER].save_pretrained(str(folder))
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return len(tensors), sum(tensor.nbytes for tensor in tensors.values())


# ---- the trainer's end -----------------------------------------------------------------------------------------------


class Transport:
    """The same process: the tensors themselves ride in the call."""

    kind = "direct"

    def open(self, control: Control, world_size: int) -> None:
        """Joins an engine of `world_size` workers; again where it came back."""
        control("init_weight_transfer_engine", init_info={"kind": self.kind})

    def send(self, control: Control, bucket: Bucket) -> None:
        """Returns once all workers have the bucket."""
        control("update_weights", update_info={"weights": bucket})

    def close(self) -> None:
        """Leaves nothing behind."""


class FileTransport(Transport):
    """Safetensors in a folder that both ends see, or in an object store: slow, and works everywhere."""

    kind = "file"

    def __init__(self, folder: str):
        self._file = f"{folder}/weights.safetensors"

    def send(self, control: Control, bucket: Bucket) -> None:
        from pyarrow.fs import FileSystem
        from safetensors.torch import save

        store, path = FileSystem.from_uri(self._file)
        store.create_dir(path.rsplit("/", 1)[0], recursive=True)
        with store.open_output_stream(path) as file:
            file.write(save({name: tensor.cpu() for name, tensor in bucket}))
        control("update_weights", update_info={"file": self._file})

    def close(self) -> None:
        from pyarrow.fs import FileSystem, FileType

        store, path = FileSystem.from_uri(self._file)
        if store.get_file_info(path).type == FileType.File:
            store.delete_file(path)


def read_tensors(file: str) -> dict[str, Tensor]:
    """What `FileTransport` wrote."""
    from pyarrow.fs import FileSystem
    from safetensors.torch import load

    store, path = FileSystem.from_uri(file)
    with store.open_input_file(path) as stream:
        return load(stream.read())


class BroadcastTransport(Transport):
    """A process group of this process (rank 0) and an engine's workers, over gloo or NCCL."""

    def __init__(self, kind: str, *, host: str, timeout: float):
        self.kind, self._host, self._timeout = kind, host, timeout
        self._group: Any = None

    def open(self, control: Control, world_size: int) -> None:
        self.close()
        meeting: dict[str, Any] = {"master_address": self._host, "world_size": world_size + 1}
        with _meanwhile() as start:
            if self.kind == "gloo":
                store = torch.distributed.TCPStore(
                    self._host, 0, world_size + 1, is_master=True, wait_for_workers=False, timeout=_span(self._timeout)
                )
                meeting |= {"kind": "gloo", "master_port": store.port, "timeout": self._timeout}
                answer = start(control, "init_weight_transfer_engine", init_info=meeting)
                self._group = _gloo_group(store, 0, world_size + 1, self._timeout)
            else:
                from vllm.distributed.weight_transfer.nccl_common import trainer_init

                meeting |= {"kind": "nccl", "master_port": free_port()}
                answer = start(control, "init_weight_transfer_engine", init_info=meeting)
                self._group = trainer_init(meeting)
            answer.result()

    def send(self, control: Control, bucket: Bucket) -> None:
        with _meanwhile() as start:  # the workers answer once they have received everything
            answer = start(control, "update_weights", update_info=describe(bucket))
            for _, tensor in bucket:
                if answer.done():  # refused before anything was received: nobody would take the rest
                    break
                _broadcast(self._group, tensor.cpu() if self.kind == "gloo" else tensor.cuda())
            answer.result()

    def close(self) -> None:
        if self._group is not None and self.kind == "nccl":
            self._group.destroy()
        self._group = None


class IpcTransport(Transport):
    """CUDA memory of this process, opened by workers on the same GPU."""

    kind = "ipc"

    def send(self, control: Control, bucket: Bucket) -> None:
        from torch.multiprocessing.reductions import reduce_tensor

        gpu = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        shared = [(name, tensor.cuda()) for name, tensor in bucket]  # kept until the workers have copied
        handles = [{gpu: reduce_tensor(tensor)[1]} for _, tensor in shared]
        pickled = base64.b64encode(pickle.dumps(handles)).decode()
        control("update_weights", update_info={**describe(shared), "ipc_handles_pickled": pickled})
        torch.cuda.ipc_collect()


def describe(bucket: Bucket) -> dict[str, list]:
    """Names, dtypes and shapes of a bucket as they travel in `update_weights`."""
    return {
        "names": [name for name, _ in bucket],
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
        "shapes": [list(tensor.shape) for _, tensor in bucket],
    }


def give_up(control: Control) -> None:
    """Ends an update whose finish was refused: vLLM takes no new one before, and ends it when an update fails."""
    try:
        control("update_weights", update_info={"given_up": True})
    except (ValueError, RuntimeError):
        return


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on at present."""
    with socket.create_server((host, 0)) as probe:
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
    """The tensor of rank 0, in place: by a gloo group of torch's, or by vLLM's NCCL."""
    if isinstance(group, torch.distributed.ProcessGroupGloo):
        options = torch.distributed.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        group.broadcast([tensor], options).wait()
    else:
        group.broadcast(tensor, src=0, stream=torch.cuda.current_stream())


# ---- the workers' end ------------------------------------------------------------------------------------------------


def register() -> None:
    """Add the back end to vLLM; the entry point of its plugins. Calling it again changes nothing."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, _worker_end())


def _worker_end() -> type:
    """The back end's class. Made here because vLLM is imported only where it is used."""
    from dataclasses import dataclass

    from vllm.distributed.weight_transfer import nccl_common
    from vllm.distributed.weight_transfer.base import WeightTransferInitInfo
    from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine

    @dataclass
    class Meeting(WeightTransferInitInfo):
        kind: str
        master_address: str = ""
        master_port: int = 0
        world_size: int = 0
        timeout: float = 0.0

    class WorkerEnd(IPCWeightTransferEngine):
        """vLLM's layerwise reload, which refuses an update that leaves parts of the model as they were."""

        init_info_cls = Meeting

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.group: Any = None
            score_before_masking()
            if self.device.type == "cpu" and torch.cpu._is_amx_tile_supported():
                # Else the first bf16 forward of at most 4 tokens dies: vLLM has not asked for the tiles by then.
                torch.cpu._init_amx()

        def init_transfer_engine(self, init_info: Meeting) -> None:
            host, port, size = init_info.master_address, init_info.master_port, init_info.world_size
            config = self.parallel_config
            if init_info.kind == "gloo":
                rank = 1 + config.data_parallel_index * config.world_size + config.rank  # the trainer has 0
                store = torch.distributed.TCPStore(host, port, is_master=False, timeout=_span(init_info.timeout))
                self.group = _gloo_group(store, rank, size, init_info.timeout)
            elif init_info.kind == "nccl":
                meeting = nccl_common.NCCLWeightTransferInitInfo(
                    master_address=host, master_port=port, rank_offset=1, world_size=size
                )
                self.group = nccl_common.worker_init_process_group(meeting, config)

        def update_weights(self, update_info: dict[str, Any]) -> None:
            try:
                if "ipc_handles_pickled" in update_info:
                    super().update_weights(update_info)
                else:
                    self._load(update_info)
            except Exception:
                _abandon(self.model)
                raise

        def _load(self, update_info: dict[str, Any]) -> None:
            tensors = self._tensors(update_info)
            try:
                self.model.load_weights(tensors)
            finally:
                for _ in tensors:  # the trainer broadcasts all of them, also those after one that is refused
                    pass
            torch.accelerator.synchronize()  # NCCL is asynchronous

        def _tensors(self, update_info: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
            if "weights" in update_info:
                yield from update_info["weights"]
            elif "file" in update_info:
                yield from read_tensors(update_info["file"]).items()
            elif "names" in update_info:
                gloo = isinstance(self.group, torch.distributed.ProcessGroupGloo)
                described = (update_info[key] for key in ("names", "dtype_names", "shapes"))
                for name, dtype, shape in zip(*described, strict=True):
                    tensor = torch.empty(shape, dtype=getattr(torch, dtype), device="cpu" if gloo else self.device)
                    _broadcast(self.group, tensor)
                    yield name, tensor.to(self.device)
            else:
                raise ValueError("the trainer gave this update up.")

        def finish_weight_update(self) -> None:
            missing = _missing(self.model)
            if missing:
                _abandon(self.model)
                raise ValueError(f"the update left out weights of {', '.join(missing[:5])} ({len(missing)} modules).")
            super().finish_weight_update()
            head = getattr(self.model, "lm_head", None)
            if self.device.type == "cpu" and self.model_config.hf_text_config.tie_word_embeddings and head is not None:
                # On a CPU a tied head has a packed copy of the embeddings, which the reload does not renew.
                head = getattr(head, "base_layer", head)
                head.quant_method.process_weights_after_loading(head)

        def shutdown(self) -> None:
            super().shutdown()
            if hasattr(self.group, "destroy"):  # NCCL
                self.group.destroy()

    return WorkerEnd


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
