"""Sending the policy's weights to vLLM: the trainer's end, and the back end that vLLM's workers load.

A full update speaks vLLM's native protocol: init_weight_transfer_engine once, then start_weight_update, update_weights
for each bucket, finish_weight_update. These calls carry plain dicts; the tensors are sent separately. vLLM finds the
workers' end through the entry point `vllm.general_plugins` (`register`), in every process that it starts. It is one
back end, `plumbline`; the first call says how the tensors are sent: `direct` (the same process), `gloo` (network, CPU),
`nccl` (other GPUs), `file`.
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loops.shared.adapters import ADAPTER, VLLM_RANKS
from loops.shared.rollout.masks import score_before_masking
from loops.shared.weights import trained_tensors

Bucket = list[tuple[str, Tensor]]

BACKEND = "plumbline"
BUCKET_BYTES = 512 * 2**20


Control = Callable[..., None]
"""One engine's end of the protocol: called with a method's name and its arguments, over HTTP or in process."""


# ---- what is sent ----------------------------------------------------------------------------------------------------


def is_plain_lora(policy: nn.Module) -> bool:
    """Whether vLLM can serve the policy's adapter by itself: LoRA with one rank and scale, on linear layers alone."""
    from peft import LoraConfig, PeftModel
    from peft.tuners.lora import LoraLayer

    lora = policy.peft_config[ADAPTER] if isinstance(policy, PeftModel) else None
    if not isinstance(lora, LoraConfig) or lora.r > VLLM_RANKS[-1] or lora.bias != "none":
        return False
    more = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias", "target_parameters")
    if any(getattr(lora, key, None) for key in more):
        return False
    ends = {id(policy.get_input_embeddings()), id(policy.get_output_embeddings())}
    layers = [module for module in policy.modules() if isinstance(module, LoraLayer)]
    return not any(id(layer) in ends or layer.lora_embedding_A for layer in layers)


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

    tensors = {name.replace(f".{ADAPTER}.", "."): tensor.contiguous() for name, tensor in trained_tensors(policy, None)}
    if writes:
        policy.peft_config[ADAPTER].save_pretrained(str(folder))
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return len(tensors), sum(tensor.nbytes for tensor in tensors.values())


# ---- the trainer's end -----------------------------------------------------------------------------------------------


class Transport:
    """In the same process: the tensors are arguments of the call."""

    kind = "direct"

    def connect(self, control: Control, world_size: int) -> None:
        """Connects to an engine of `world_size` workers; called again when it has come back."""
        control("init_weight_transfer_engine", init_info={"kind": self.kind})

    def send(self, control: Control, bucket: Bucket) -> None:
        """Returns once all workers have the bucket."""
        control("update_weights", update_info={"weights": bucket})

    def close(self) -> None:
        """Removes what the transfer has made."""


class FileTransport(Transport):
    """Safetensors in a folder that both ends see: slow, and works everywhere."""

    kind = "file"

    def __init__(self, folder: Path, number: int = 0):
        """folder: of its own; number: of the server, for its file."""
        self._path = folder / f"weights-{number}.safetensors"
        folder.mkdir(parents=True, exist_ok=True)

    def send(self, control: Control, bucket: Bucket) -> None:
        from safetensors.torch import save_file

        save_file({name: tensor.cpu() for name, tensor in bucket}, self._path)
        control("update_weights", update_info={"file": str(self._path)})

    def close(self) -> None:
        shutil.rmtree(self._path.parent, ignore_errors=True)


class BroadcastTransport(Transport):
    """A process group of this process (rank 0) and an engine's workers, over gloo or NCCL."""

    def __init__(self, kind: str, *, host: str, timeout: float):
        self.kind, self._host, self._timeout = kind, host, timeout
        self._group: Any = None

    def connect(self, control: Control, world_size: int) -> None:
        self.close()
        rendezvous: dict[str, Any] = {"kind": self.kind, "master_address": self._host, "world_size": world_size + 1}
        if self.kind == "gloo":
            span = timedelta(seconds=self._timeout)
            store = torch.distributed.TCPStore(
                self._host, 0, world_size + 1, is_master=True, wait_for_workers=False, timeout=span
            )
            rendezvous |= {"master_port": store.port, "timeout": self._timeout}
        else:
            from vllm.distributed.weight_transfer.nccl_common import trainer_init

            rendezvous["master_port"] = free_port()
        with _concurrently(control, "init_weight_transfer_engine", init_info=rendezvous) as answer:
            wait([answer], 0.5)
            if not (answer.done() and answer.exception()):  # else refused: nobody would come
                self._group = (
                    _gloo_group(store, 0, world_size + 1, span) if self.kind == "gloo" else trainer_init(rendezvous)
                )

    def send(self, control: Control, bucket: Bucket) -> None:
        if self._group is None:
            raise RuntimeError("the group of the workers has ended")
        try:  # the workers answer once they have received everything
            with _concurrently(control, "update_weights", update_info=describe(bucket)) as answer:
                for _, tensor in bucket:
                    if answer.done():  # refused before anything was received: nobody would take the rest
                        break
                    _broadcast(self._group, tensor.cpu() if self.kind == "gloo" else tensor.cuda())
        except Exception:
            if self.kind == "nccl":  # it would wait for workers that are gone, and the trainer's stream with it
                self.close()
            raise

    def close(self) -> None:
        if self._group is not None and self.kind == "nccl":
            self._group.destroy()
        self._group = None


def describe(bucket: Bucket) -> dict[str, list]:
    """Names, dtypes and shapes of a bucket as they travel in `update_weights`."""
    return {
        "names": [name for name, _ in bucket],
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
        "shapes": [list(tensor.shape) for _, tensor in bucket],
    }


def abort_update(control: Control) -> None:
    """Ends an unfinished update: vLLM takes no new one before that."""
    try:
        control("update_weights", update_info={"aborted": True})
    except (ValueError, RuntimeError):
        return


def free_port(port: int = 0) -> int:
    """A port of this machine that nobody listens on at present; OSError where the given one is taken."""
    with socket.create_server(("127.0.0.1", port)) as probe:
        return probe.getsockname()[1]


@contextmanager
def _concurrently(control: Control, method: str, **arguments: Any) -> Iterator[Future]:
    """Runs a call in a thread while the block runs, and waits for it; not after an error of the block."""
    pool = ThreadPoolExecutor(1)
    answer = pool.submit(control, method, **arguments)
    try:
        yield answer
        answer.result()
    except Exception as error:
        # The call's own error says more than the connection that broke because of it.
        if wait([answer], timeout=5).done and answer.exception() not in (None, error):
            raise answer.exception() from error  # type: ignore[misc]
        raise
    finally:
        pool.shutdown(wait=False)


def _gloo_group(store: torch.distributed.Store, rank: int, world_size: int, span: timedelta) -> Any:
    """A group of its own, beside the default one of the process."""
    prefixed = torch.distributed.PrefixStore("plumbline", store)
    return torch.distributed.ProcessGroupGloo(prefixed, rank, world_size, span)


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
    from safetensors.torch import load
    from vllm.distributed.weight_transfer import nccl_common
    from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine

    class WorkerEnd(IPCWeightTransferEngine):
        """vLLM's layerwise reload, which refuses an update that leaves parts of the model as they were."""

        init_info_cls = dict  # type: ignore[assignment]

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.group: Any = None
            score_before_masking()
            if self.device.type == "cpu" and torch.cpu._is_amx_tile_supported():
                # Else the first bf16 forward of at most 4 tokens dies: vLLM has not asked for the tiles by then.
                torch.cpu._init_amx()

        def init_transfer_engine(self, init_info: Any) -> None:
            config, kind = self.parallel_config, init_info["kind"]
            if kind in ("gloo", "nccl"):
                host, port, size = (init_info[key] for key in ("master_address", "master_port", "world_size"))
            if kind == "gloo":
                rank = 1 + config.data_parallel_index * config.world_size + config.rank  # the trainer has 0
                span = timedelta(seconds=init_info["timeout"])
                store = torch.distributed.TCPStore(host, port, is_master=False, timeout=span)
                self.group = _gloo_group(store, rank, size, span)
            elif kind == "nccl":
                rendezvous = nccl_common.NCCLWeightTransferInitInfo(
                    master_address=host, master_port=port, rank_offset=1, world_size=size
                )
                self.group = nccl_common.worker_init_process_group(rendezvous, config)

        def update_weights(self, update_info: dict[str, Any]) -> None:
            try:
                self._load(update_info)
            except Exception:
                _restore_modules(self.model)
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
                yield from load(Path(update_info["file"]).read_bytes()).items()
            elif "names" in update_info:
                names, dtypes, shapes = (update_info[key] for key in ("names", "dtype_names", "shapes"))
                with ThreadPoolExecutor(1) as pool:  # over a network the next ones arrive while one is loaded
                    each = pool.map if isinstance(self.group, torch.distributed.ProcessGroupGloo) else map
                    yield from zip(names, each(self._receive, dtypes, shapes), strict=True)
            else:
                raise ValueError("the trainer aborted this update.")

        def _receive(self, dtype: str, shape: list[int]) -> Tensor:
            gloo = isinstance(self.group, torch.distributed.ProcessGroupGloo)
            tensor = torch.empty(shape, dtype=getattr(torch, dtype), device="cpu" if gloo else self.device)
            _broadcast(self.group, tensor)
            return tensor.to(self.device)

        def finish_weight_update(self) -> None:
            missing = _unfilled_modules(self.model)
            if missing:
                _restore_modules(self.model)
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


def _restore_modules(model: nn.Module) -> None:
    """Undo the start of an update that failed, in all modules of the model.

    vLLM would count its tensors as part of the next update, and other engines in the process share some modules.
    """
    from vllm.model_executor.model_loader.reload.layerwise import _place_kernel_tensors, get_layerwise_info

    for module in model.modules():
        info = get_layerwise_info(module)
        if info.can_load() and info.kernel_tensors is not None:
            _place_kernel_tensors(module, info)
            info.reset()


def _unfilled_modules(model: nn.Module) -> list[str]:
    """Modules, by vLLM's names, of which the present update has brought no weights or only parts."""
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
