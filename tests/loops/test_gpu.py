"""What only a GPU can show: the flash path of packed attention, bf16, and a run of each loop on CUDA."""

import copy

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from data.pack import pack_groups
from loops.shared.attention import Layout, flash_call, packed_attention
from loops.shared.policy import TOLERANCE, enable_packing, score, score_plain, self_check
from tests.loops.test_runs import LOOPS, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def groups(seed=0, groups=3):
    g = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(3, 500, (n,), generator=g).tolist()  # noqa: E731
    return [(draw(40 + 30 * i), [draw(20 + 17 * j) for j in range(4)]) for i in range(groups)]


def tiny(dtype):
    torch.manual_seed(0)
    shape = dict(vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4)
    return Qwen3ForCausalLM(Qwen3Config(**shape, num_key_value_heads=2, head_dim=64)).to("cuda", dtype)


@pytest.mark.parametrize("window", [None, 16])
def test_flash_and_bucket_attention_agree(window):
    """The variable-length flash call in bf16 against the bucketed SDPA in fp32 on the same numbers; gradients too."""
    assert flash_call() is not None
    batch = pack_groups(groups()).to("cuda")
    layout = Layout(batch.segments, torch.device("cuda"))
    torch.manual_seed(0)
    n = batch.num_tokens
    sharp = [torch.randn(1, heads, n, 64, device="cuda").bfloat16() for heads in (4, 2, 2)]
    module = torch.nn.Module()
    outs = []
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v = (x.to(dtype).requires_grad_() for x in sharp)
        out, _ = packed_attention(module, q, k, v, None, layout=layout, scaling=0.125, sliding_window=window)
        out.float().square().sum().backward()
        outs.append([out.float(), q.grad.float(), k.grad.float(), v.grad.float()])
    for low, high in zip(*outs, strict=True):
        assert (low - high).norm() / high.norm() < 0.02


def test_packed_bf16_is_as_near_to_fp32_as_plain_bf16():
    """bf16 rounds; the packed path must not round more than the plain one does."""
    exact = tiny(torch.float32)
    model = copy.deepcopy(exact).bfloat16()
    enable_packing(model)
    batch = pack_groups(groups()).to("cuda")
    reference = score_plain(exact, batch).logprobs
    packed = (score(model, batch).logprobs - reference).abs().mean()
    plain = (score_plain(model, batch).logprobs - reference).abs().mean()
    assert packed <= 1.2 * plain
    difference, reason = self_check(model, batch, compute_dtype=torch.bfloat16)
    assert reason is None and difference < TOLERANCE[torch.bfloat16]


def test_fp32_on_a_gpu_is_exact():
    model = tiny(torch.float32)
    enable_packing(model)
    batch = pack_groups(groups()).to("cuda")
    assert (score(model, batch).logprobs - score_plain(model, batch).logprobs).abs().max() < 1e-4


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("lora", ["0", "4"])
def test_a_loop_trains_on_a_gpu(loop, lora, tmp_path):
    options = ["--max_steps", "3", "--learning_rate", "1e-3", "--lora_r", lora, "--merge_weights"]
    rows = run(loop, tmp_path, *options)
    assert all(row["optim/grad_norm"] > 0 for row in rows[1:])
    if loop == "grpo":
        assert rows[1]["policy/mismatch_max"] < 0.5  # bf16 sampler and bf16 trainer, the same weights
