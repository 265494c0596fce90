"""Chunked log-probs against torch.log_softmax, value and gradient, and the CUDA kernels in Triton's interpreter.

The interpreter runs the kernels' own code on CPU tensors; tests/gpu/test_kernels.py runs what the compiler makes of it.
The tensor-parallel path runs in test_layouts.py. Without Triton, which the CPU environment does not ask for, the
kernels' test is skipped.
"""

from importlib.util import find_spec

import pytest
import torch

from megatron_fipo.policy import logprobs
from tests.triton_interpreter import run_interpreted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_matches_log_softmax(dtype: torch.dtype, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "_CHUNK_ELEMENTS", 64 * 40)
    torch.manual_seed(0)
    logits = torch.randn(3, 50, 40).to(dtype).requires_grad_()
    labels, weights = torch.randint(0, 37, (3, 50)), torch.randn(3, 50)
    before = logits.detach().clone()
    log_probs, entropy = logprobs.log_probs_and_entropy(logits, labels, 37, temperature)
    (gradient,) = torch.autograd.grad((log_probs * weights).sum(), logits)
    assert torch.equal(logits, before), "the caller's logits are not scratch space"

    plain = (logits.float()[..., :37] / temperature).log_softmax(-1)  # three columns are padding
    expected = plain.gather(-1, labels[..., None])[..., 0]
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), logits)
    torch.testing.assert_close(log_probs, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, -(plain.exp() * plain).sum(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    assert gradient[..., 37:].abs().max() == 0


def test_the_gradient_may_be_written_over_the_logits() -> None:
    """As the policy has it, whose logits are no leaf: the gradient below them is the same."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 9, 16), torch.randn(40, 16, requires_grad=True)
    labels, weights = torch.randint(0, 37, (2, 9)), torch.randn(2, 9)
    gradients = []
    for overwrite in (False, True):
        logits = hidden @ weight.T
        log_probs, _ = logprobs.log_probs_and_entropy(logits, labels, 37, overwrite=overwrite)
        gradients += torch.autograd.grad((log_probs * weights).sum(), weight)
        assert (logits[..., 37:].abs().max() == 0) == overwrite, "the padding's gradient is 0"
    assert torch.equal(*gradients)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed; it comes with torch for CUDA")
def test_the_kernels_equal_the_torch_path() -> None:
    assert run_interpreted("tests.policy.triton_logprobs_worker") < 1e-5
