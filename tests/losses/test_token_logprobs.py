"""The fused head against the plain one. Shapes: N tokens, H hidden, V vocabulary."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from losses.logprobs import token_logprobs

ROOT = Path(__file__).resolve().parents[2]
VARIANTS: dict[str, dict[str, float]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "scale": {"scale": 1.3, "temperature": 1.7},
    "softcap": {"softcap": 1.5},
    "everything": {"softcap": 2.0, "scale": 1.3, "temperature": 0.7},
}


def reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The definition with all logits at once, in float64."""
    logits = hidden.double() @ weight.double().T
    if bias is not None:
        logits = logits + bias.double()
    logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logprobs = torch.log_softmax(logits / temperature, dim=-1)  # [N, V]
    return logprobs[torch.arange(len(targets)), targets], -(logprobs.exp() * logprobs).sum(dim=-1)


def problem(
    tokens: int = 5, width: int = 3, vocabulary: int = 7, *, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64).to(dtype)
    bias = torch.randn(vocabulary, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    return hidden, weight, bias, targets


class CountProducts(TorchDispatchMode):
    """Counts the matrix products that run while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return function(*args, **(kwargs or {}))


def test_two_logits_by_hand() -> None:
    """Logits (0, log 3): p = (1/4, 3/4). Temperature 1/2 or scale 2 doubles them: (0, log 9), p = (1/10, 9/10).

    Entropy of (1/4, 3/4): 1/4 log 4 + 3/4 log 4/3 = log 4 - 3/4 log 3. Bias (log 3, 0) makes both logits log 3: p = 1/2
    and entropy log 2. A cap c turns log 3 into c tanh(log 3 / c); c = log 3 / atanh(1/2) makes it c / 2.
    """
    hidden, weight = torch.ones(2, 1).double(), torch.tensor([[0.0], [math.log(3)]]).double()
    targets = torch.tensor([0, 1])

    logprobs, entropy = token_logprobs(hidden, weight, targets)
    torch.testing.assert_close(logprobs.exp(), torch.tensor([0.25, 0.75]).double())
    torch.testing.assert_close(entropy, torch.full((2,), math.log(4) - 0.75 * math.log(3)).double())
    for double_it in ({"temperature": 0.5}, {"scale": 2.0}):
        torch.testing.assert_close(
            token_logprobs(hidden, weight, targets, **double_it)[0].exp(), torch.tensor([0.1, 0.9]).double()
        )
    bias = torch.tensor([math.log(3), 0.0]).double()
    torch.testing.assert_close(
        token_logprobs(hidden, weight, targets, bias=bias)[1].exp(), torch.full((2,), 2.0).double()
    )
    cap = math.log(3) / math.atanh(0.5)
    odds = math.exp(cap / 2)
    torch.testing.assert_close(
        token_logprobs(hidden, weight, targets, softcap=cap)[0].exp(), torch.tensor([1.0, odds]).double() / (1 + odds)
    )


def test_improbable_token_keeps_its_logprob() -> None:
    """Logits (0, -1000) in fp32: exp(-1000) is 0, but log p is -1000 and not -inf; the entropy is 0."""
    logprobs, entropy = token_logprobs(torch.ones(1, 1), torch.tensor([[0.0], [-1000.0]]), torch.tensor([1]))
    assert logprobs.item() == -1000.0
    assert entropy.item() == 0.0


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("chunk_tokens", [1, 2, 5, 100, None])
def test_values_equal_the_definition_for_any_chunk(variant: str, chunk_tokens: int | None) -> None:
    hidden, weight, bias, targets = problem()
    got = token_logprobs(hidden, weight, targets, bias=bias, chunk_tokens=chunk_tokens, **VARIANTS[variant])
    want = reference(hidden, weight, targets, bias, **VARIANTS[variant])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("outputs", ["logprobs", "entropy", "both"])
@pytest.mark.parametrize("trained", ["head", "weight", "bias", "frozen"])
def test_gradients_of_every_path(variant: str, outputs: str, trained: str) -> None:
    """Numerical derivatives in float64. Five tokens in chunks of 2: two whole tiles and a last one of one token."""
    hidden, weight, bias, targets = problem()
    hidden.requires_grad_(trained in ("head", "frozen"))
    weight.requires_grad_(trained in ("head", "weight"))
    bias.requires_grad_(trained in ("head", "bias"))

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        logprobs, entropy = token_logprobs(hidden, weight, targets, bias=bias, chunk_tokens=2, **VARIANTS[variant])
        return {"logprobs": (logprobs,), "entropy": (entropy,), "both": (logprobs, entropy)}[outputs]

    assert torch.autograd.gradcheck(function, (hidden, weight, bias))


def test_entropy_bonus_adds_to_the_logprob_gradient() -> None:
    """One backward of sum(a * logprob + b * entropy) equals autograd through the definition, frozen head or not."""
    hidden, weight, _, targets = problem(tokens=9)
    a, b = torch.randn(2, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for trained in (True, False):
        inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)]
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        losses = [
            (a * logprobs + b * entropy).sum()
            for logprobs, entropy in (
                token_logprobs(*inputs, targets, softcap=2.0, chunk_tokens=4),
                reference(*inputs, targets, softcap=2.0),
            )
        ]
        got, want = (torch.autograd.grad(loss, wanted) for loss in losses)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_number_of_matrix_products() -> None:
    """Of n tiles, forward takes n products.

    A frozen head takes n more and then none in backward; a trained head 2 n in backward (hidden and weight) and n - 1
    tiles computed again, the last one being kept. An entropy gradient computes all n again.
    """
    hidden, weight, _, targets = problem()  # 5 tokens in chunks of 2: n = 3
    for trained, with_entropy, forward, backward in (
        (False, False, 3 + 3, 0),
        (True, False, 3, 2 * 3 + 2),
        (False, True, 3 + 3, 3 + 3),
        (True, True, 3, 2 * 3 + 3),
    ):
        inputs = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)
        with CountProducts() as in_forward:
            logprobs, entropy = token_logprobs(*inputs, targets, chunk_tokens=2)
        with CountProducts() as in_backward:
            (logprobs + entropy if with_entropy else logprobs).sum().backward()
        assert (in_forward.products, in_backward.products) == (forward, backward)
    with CountProducts() as without_grad, torch.no_grad():
        token_logprobs(hidden.requires_grad_(), weight, targets, chunk_tokens=2)
    assert without_grad.products == 3


def test_default_tile_is_64_mib_on_cpu() -> None:
    """16,384 fp32 logits are 64 KiB, so 1,024 tokens fill a tile: 2,049 tokens are three tiles, 1,024 are one."""
    weight = torch.ones(16384, 1)
    for tokens, tiles in ((1024, 1), (2049, 3)):
        with CountProducts() as count:
            token_logprobs(torch.ones(tokens, 1), weight, torch.zeros(tokens, dtype=torch.int64))
        assert count.products == tiles


def test_backward_twice_gives_the_same() -> None:
    hidden, weight, _, targets = problem()
    hidden.requires_grad_(), weight.requires_grad_()
    loss = token_logprobs(hidden, weight, targets, chunk_tokens=2, softcap=2.0)[0].sum()
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, (hidden, weight)), strict=True))


def test_inputs_are_left_as_they_were() -> None:
    hidden, weight, bias, targets = problem()
    before = [tensor.clone() for tensor in (hidden, weight, bias, targets)]
    hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()
    logprobs, entropy = token_logprobs(hidden, weight, targets, bias=bias, softcap=2.0, temperature=0.7, chunk_tokens=2)
    (logprobs + entropy).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip((hidden, weight, bias, targets), before, strict=True))


def test_no_tokens_still_run_backward() -> None:
    """A rank without target tokens must take part in every collective: zeros with a path for gradients."""
    for trained in (True, False):
        hidden, weight = torch.zeros(0, 3, requires_grad=True), torch.ones(7, 3, requires_grad=trained)
        logprobs, entropy = token_logprobs(hidden, weight, torch.zeros(0, dtype=torch.int64))
        assert logprobs.shape == entropy.shape == (0,)
        (logprobs.sum() + entropy.sum()).backward()
        assert hidden.grad is not None and hidden.grad.shape == (0, 3)
        assert weight.grad is None if not trained else torch.equal(weight.grad, torch.zeros(7, 3))


def test_memory_layout_does_not_matter() -> None:
    hidden, weight, _, targets = problem()
    want = token_logprobs(hidden, weight, targets, chunk_tokens=2)
    strided = hidden.T.contiguous().T, weight.repeat_interleave(2, dim=1)[:, ::2], targets.repeat_interleave(2)[::2]
    assert not any(tensor.is_contiguous() for tensor in strided)
    torch.testing.assert_close(token_logprobs(*strided, chunk_tokens=2), want, rtol=1e-14, atol=1e-14)


def test_bf16_logits_are_never_rounded() -> None:
    """bf16 inputs: fp32 sums leave about 1e-6; rounding logits of standard deviation 3 to bf16 (8 bits) leaves 1e-2."""
    hidden, weight, _, targets = problem(200, 64, 1000, dtype=torch.bfloat16)
    weight = weight * 0.375  # logits of standard deviation 8 * 0.375 = 3; exact in bf16 up to one rounding
    want, want_entropy = reference(hidden, weight, targets)
    got, entropy = token_logprobs(hidden, weight, targets, chunk_tokens=64)
    rounded = torch.log_softmax((hidden @ weight.T).float(), dim=-1).gather(1, targets.unsqueeze(1)).squeeze(1)
    assert got.dtype == entropy.dtype == torch.float32
    assert (got - want).abs().max() < 2e-5
    assert (entropy - want_entropy).abs().max() < 2e-5
    assert (rounded - want).abs().mean() > 2e-3  # what this test would catch


@pytest.mark.parametrize("trained", [True, False])
def test_autocast_changes_nothing(trained: bool) -> None:
    """Plain bf16 autocast would round the logits; here the value and every gradient are bit for bit the same."""
    hidden, weight, bias, targets = problem(20, 16, 50, dtype=torch.float32)
    results = []
    for enabled in (False, True):
        inputs = [tensor.clone().requires_grad_(trained or i == 0) for i, tensor in enumerate((hidden, weight, bias))]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            logprobs, entropy = token_logprobs(*inputs[:2], targets, bias=inputs[2], chunk_tokens=8)
            (logprobs + entropy if trained else logprobs).sum().backward()
        results.append([logprobs, entropy, *(tensor.grad for tensor in inputs if tensor.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_bf16_weight_gradient_is_summed_in_fp32() -> None:
    """2,000 tokens, one a tile. Summing in fp32 leaves the one rounding of the result, 2^-9 of it.

    A bf16 sum stops growing when a term is below half a unit in the last place of the total.
    """
    hidden, weight, _, targets = problem(2000, 4, 3, dtype=torch.bfloat16)
    hidden = hidden.abs()  # terms of one sign, so that the sum grows
    targets = torch.zeros_like(targets)
    exact = weight.double().requires_grad_()
    reference(hidden, exact, targets)[0].sum().backward()
    weight.requires_grad_()
    token_logprobs(hidden, weight, targets, chunk_tokens=1)[0].sum().backward()
    assert weight.grad is not None and exact.grad is not None and weight.grad.dtype == torch.bfloat16
    assert ((weight.grad - exact.grad) / exact.grad).abs().max() < 2**-8

    p = torch.softmax(hidden.double() @ weight.detach().double().T, dim=-1)
    terms = ((torch.arange(3) == 0).double() - p).unsqueeze(2) * hidden.double().unsqueeze(1)  # [N, V, H]
    naive = torch.zeros_like(weight)
    for term in terms.bfloat16():
        naive += term
    assert ((naive - exact.grad) / exact.grad).abs().max() > 2**-5  # what this test would catch


def test_frozen_head_gives_the_trained_heads_gradient() -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2**-6)):
        hidden, weight, _, targets = problem(30, 8, 40, dtype=dtype)
        factors = torch.randn(30, generator=torch.Generator().manual_seed(2))
        grads = []
        for trained in (True, False):
            leaf = hidden.clone().requires_grad_()
            logprobs, _ = token_logprobs(leaf, weight.clone().requires_grad_(trained), targets, chunk_tokens=7)
            (logprobs * factors).sum().backward()
            grads.append(leaf.grad)
        torch.testing.assert_close(*grads, rtol=tolerance, atol=tolerance)


def test_dtypes_of_hidden_and_weight_may_differ() -> None:
    """bf16 hidden states and an fp32 head are multiplied in fp32; float64 wins over both."""
    hidden, weight, _, targets = problem(20, 16, 50)
    for hidden_dtype, weight_dtype, result in (
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
    ):
        h, w = hidden.to(hidden_dtype).requires_grad_(), weight.to(weight_dtype).requires_grad_()
        logprobs, entropy = token_logprobs(h, w, targets, chunk_tokens=8)
        assert logprobs.dtype == entropy.dtype == result
        torch.testing.assert_close(logprobs.double(), reference(h, w, targets)[0], rtol=1e-5, atol=1e-5)
        logprobs.sum().backward()
        assert h.grad is not None and h.grad.dtype == hidden_dtype
        assert w.grad is not None and w.grad.dtype == weight_dtype


MEASURE_MEMORY = """
import json
from pathlib import Path

import torch
from losses.logprobs import token_logprobs

def peak():
    status = Path("/proc/self/status").read_text()  # getrusage's peak would include the process that started this one
    return int(status.split("VmHWM:")[1].split()[0]) / 1024  # MiB

def plain(hidden, weight, targets):
    return torch.log_softmax(hidden @ weight.T, dim=-1).gather(1, targets.unsqueeze(1)).squeeze(1)

def fused(hidden, weight, targets):
    return token_logprobs(hidden, weight, targets, chunk_tokens=64)[0]

def growth(function, tokens, trained):
    weight = torch.ones(16384, 32, requires_grad=trained)
    hidden, targets = torch.ones(tokens, 32, requires_grad=True), torch.zeros(tokens, dtype=torch.int64)
    before = peak()
    function(hidden, weight, targets).sum().backward()
    return peak() - before

torch.set_num_threads(1)
growth(fused, 64, True), growth(plain, 64, True)  # the libraries' own buffers
print(json.dumps([growth(fused, 2048, False), growth(fused, 2048, True), growth(plain, 2048, True)]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of resident memory from Linux")
def test_memory_grows_with_the_hidden_states_and_not_with_the_vocabulary() -> None:
    """2,048 tokens x 16,384 vocabulary x 4 bytes = 128 MiB, held at least twice by the plain head (logits, softmax).

    The fused head holds tiles of 64 tokens (4 MiB each) and [N, H] (0.25 MiB): under 32 MiB with all its friends.
    """
    run = subprocess.run([sys.executable, "-c", MEASURE_MEMORY], cwd=ROOT, capture_output=True, text=True, check=True)
    frozen, trained, plain = json.loads(run.stdout)
    assert frozen < 32 and trained < 32
    assert plain > 2 * 120


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"softcap": -1.0}, "softcap must be above 0"),
        ({"chunk_tokens": 0}, "chunk_tokens must be above 0"),
        ({"bias": torch.zeros(6)}, "bias must have shape"),
        ({"targets": torch.zeros(4, dtype=torch.int64)}, "do not fit together"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, Any], sentence: str) -> None:
    hidden, weight, _, targets = problem()
    arguments: dict[str, Any] = {"hidden": hidden, "weight": weight, "targets": targets} | change
    with pytest.raises(ValueError, match=sentence):
        token_logprobs(**arguments)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_bf16_on_cuda_equals_the_definition() -> None:
    """The product of bf16 operands comes out in fp32; gradients are rounded to bf16 once or twice, 2^-9 each."""
    hidden, weight, bias, targets = (tensor.cuda() for tensor in problem(200, 64, 1000, dtype=torch.bfloat16))
    grads = []
    for function, options in ((token_logprobs, {"chunk_tokens": 64}), (reference, {})):
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
        logprobs, entropy = function(*leaves[:2], targets, bias=leaves[2], **options)
        (logprobs + 0.1 * entropy).sum().backward()
        grads.append([logprobs.double(), entropy.double(), *(leaf.grad.double() for leaf in leaves)])
    for i, (got, want) in enumerate(zip(*grads, strict=True)):
        assert (got - want).norm() / want.norm() < (1e-5 if i < 2 else 2**-6)
