"""Activation offload: the same gradients to the bit, nothing but activations moved, nothing of them left behind."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import loops.shared.layers as layers
from data.pack import pack_groups
from loops.shared.layers import layer_classes, offload_activations
from loops.shared.policy import enable_packing, score

LAYERS, HIDDEN = 3, 32


@pytest.fixture(autouse=True)
def tiny_tensors_count(monkeypatch):
    monkeypatch.setattr(layers, "MIN_BYTES", 256)


@pytest.fixture
def parked(monkeypatch) -> list[torch.UntypedStorage]:
    """The storages that were copied to host memory, in order."""
    return record(monkeypatch.setattr)


def record(setattr_=setattr) -> list[torch.UntypedStorage]:
    storages = []

    class Recorded(layers._HostCopy):
        def __init__(self, storage):
            storages.append(storage)
            super().__init__(storage)

    setattr_(layers, "_HostCopy", Recorded)
    return storages


def tiny(*, lora: bool = False, checkpointing: bool = False, packing: bool = True) -> nn.Module:
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    shape = dict(vocab_size=128, hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=LAYERS)
    model = Qwen3ForCausalLM(Qwen3Config(**shape, num_attention_heads=4, num_key_value_heads=2, head_dim=8))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if lora:
        settings = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.1)
        model = get_peft_model(model, settings)
    if packing:
        enable_packing(model)
    return model.train()


def batch():
    g = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(3, 100, (n,), generator=g).tolist()  # noqa: E731
    return pack_groups([(draw(10), [draw(5 + j) for j in range(3)]) for _ in range(3)])


def gradients(model: nn.Module) -> list[Tensor]:
    """One forward and backward, with the same dropout each time."""
    torch.manual_seed(1)
    scores = score(model, batch())
    (scores.logprobs.sum() + scores.entropy.sum()).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("packing", [False, True])
def test_gradients_are_the_same_to_the_bit(lora, checkpointing, packing, parked):
    setting = dict(lora=lora, checkpointing=checkpointing, packing=packing)
    expected = gradients(tiny(**setting))
    assert not parked
    model = tiny(**setting)
    offload_activations(model)
    got = gradients(model)
    assert parked and len(got) == len(expected) > 0
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


def test_a_checkpointed_layer_parks_its_input_and_nothing_else(parked):
    """One [N, H] tensor of float32 a layer: N tokens x 32 x 4 bytes, three times."""
    model = tiny(lora=True, checkpointing=True)
    offload_activations(model)
    gradients(model)
    assert [storage.nbytes() for storage in parked] == [batch().num_tokens * HIDDEN * 4] * LAYERS


def test_weights_and_what_layers_share_stay_where_they_are(parked):
    model = tiny(lora=True)
    offload_activations(model)
    shared = []
    layer = model.get_base_model().model.layers[1]
    layer.register_forward_pre_hook(
        lambda _, __, kwargs: shared.extend(kwargs["position_embeddings"]), with_kwargs=True
    )
    gradients(model)
    kept = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers(), *shared)}
    assert len(shared) == 2 and not kept & {storage.data_ptr() for storage in parked}


def test_one_copy_serves_all_that_saved_the_same_storage(parked):
    """The input of the three attention projections is saved three times, and copied once: no storage comes twice."""
    model = tiny()
    offload_activations(model)
    gradients(model)
    assert len({storage._cdata for storage in parked}) == len(parked)  # `parked` keeps all of them alive


@pytest.mark.parametrize("offloaded", [False, True])
def test_after_the_forward_nothing_of_a_layer_is_left_on_the_device(offloaded):
    """The MLP's inner activation is saved for backward: it outlives the forward, unless it was copied away."""
    model = tiny()
    if offloaded:
        offload_activations(model)
    seen = []
    product = model.model.layers[1].mlp.down_proj
    product.register_forward_pre_hook(lambda _, inputs: seen.append(weakref.ref(inputs[0].untyped_storage())))
    scores = score(model, batch())
    assert (seen[0]() is None) == offloaded
    scores.logprobs.sum().backward()


def test_a_tensor_written_to_between_two_uses_is_kept_in_both_versions():
    """y = x^2, then x doubles in place through a view of its detached storage that shares its version, then z = x^2.

    dy/da = 2 a and dz/db = 2 b with b = 2 a: one copy for both would give 2 a twice.
    """

    class Layer(nn.Module):
        def forward(self, a: Tensor) -> Tensor:
            x = a * 1.0
            with torch.no_grad():
                first = x.detach()
            y = _Square.apply(a, first)
            first.mul_(2.0)
            return y + _Square.apply(a, first)

    class _Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, value):
            ctx.save_for_backward(value)
            return value * value

        @staticmethod
        def backward(ctx, grad):
            return grad * 2 * ctx.saved_tensors[0], None

    model = nn.ModuleList([Layer(), Layer()])
    offload_activations(model)
    a = torch.full((100,), 3.0, requires_grad=True)
    model[0](a).sum().backward()
    assert a.grad.tolist() == [2 * 3.0 + 2 * 6.0] * 100


def test_backward_can_run_twice():
    model = tiny()
    offload_activations(model)
    loss = score(model, batch()).logprobs.sum()
    once = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    assert all(
        torch.equal(x, y) for x, y in zip(once, torch.autograd.grad(loss, list(model.parameters())), strict=True)
    )


def test_without_gradients_nothing_moves(parked):
    model = tiny()
    offload_activations(model)
    with torch.no_grad():
        score(model, batch())
    assert not parked


def test_the_layers_keep_their_name_and_can_be_copied():
    model = tiny()
    names = layer_classes(model)
    offload_activations(model)
    offload_activations(model)  # once is enough, twice does no harm
    assert layer_classes(model) == names == ["Qwen3DecoderLayer"]
    assert len({type(layer) for layer in model.model.layers}) == 1
    twin = copy.deepcopy(model)
    assert all(torch.equal(x, y) for x, y in zip(gradients(twin), gradients(model), strict=True))


def test_a_model_without_layers_is_refused():
    with pytest.raises(ValueError, match="activation_offloading.*Linear"):
        offload_activations(nn.Linear(1, 1))


def test_shards_give_the_same_gradients_and_their_gathered_weights_stay():
    """FSDP2 over two processes; in a process of its own, since forked children of a threaded parent hang."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(root), *sys.path[1:]])}
    done = subprocess.run([sys.executable, __file__], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def sharded_gradients_are_the_same() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    layers.MIN_BYTES = 256
    storages = record()
    mesh = init_device_mesh("cpu", (2,))
    for checkpointing in (False, True):
        sizes, results = [], []
        for sharded in (False, True):
            model = tiny(lora=True, checkpointing=checkpointing)
            plain = copy.deepcopy(model)
            offload_activations(model)
            for each in (plain, model):
                for layer in each.get_base_model().model.layers if sharded else ():
                    fully_shard(layer, mesh=mesh)
                if sharded:
                    fully_shard(each, mesh=mesh)
            storages.clear()
            results = [gradients(plain), gradients(model)]
            sizes.append([storage.nbytes() for storage in storages])
            for one, other in zip(*results, strict=True):
                assert torch.equal(one.to_local(), other.to_local()) if sharded else torch.equal(one, other)
        assert sizes[0] and sizes[0] == sizes[1]  # the same activations, and none of the gathered weights


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_on_a_gpu_falls_by_the_layers_activations(checkpointing, monkeypatch):
    """24 layers, 8,192 tokens of 1,024 in bfloat16: 16 MiB an input of a layer, 384 MiB for all of them. After the
    forward at least nine tenths of that are gone, and the gradients are the same to the bit."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    monkeypatch.setattr(layers, "MIN_BYTES", 2**16)
    shape = dict(vocab_size=512, hidden_size=1024, intermediate_size=2048, num_hidden_layers=24, num_attention_heads=8)
    held, results = [], []
    for offloaded in (False, True):
        torch.manual_seed(0)
        with torch.device("cuda"):
            model = Qwen3ForCausalLM(Qwen3Config(**shape, num_key_value_heads=8, head_dim=128)).bfloat16()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if offloaded:
            offload_activations(model)
        ids = torch.arange(8192, device="cuda").remainder(512)[None]
        before = torch.cuda.memory_allocated()
        loss = model.train()(input_ids=ids, use_cache=False).logits.float().logsumexp(-1).sum()
        held.append(torch.cuda.memory_allocated() - before)
        loss.backward()
        results.append([p.grad.clone() for p in model.parameters()])
        del model, loss
    assert held[0] - held[1] > 0.9 * 24 * 8192 * 1024 * 2
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


if __name__ == "__main__":
    from accelerate import debug_launcher

    torch.set_num_threads(1)
    debug_launcher(sharded_gradients_are_the_same, num_processes=2)
