"""Credit and log-probs by their CUDA kernels against fp64, which tests/algorithm and tests/policy hold too."""

import pytest
import torch

from megatron_fipo.algorithm.credit import suffix_scan
from megatron_fipo.policy.logprobs import log_probs_and_entropy

pytestmark = pytest.mark.gpu


@pytest.mark.usefixtures("triton")
def test_suffix_scan_against_fp64() -> None:
    """Relative to the sum of the terms' absolute values, which bounds what any fp32 sum can lose."""
    lengths, gamma = torch.tensor([20_480, 1, 1024, 1023, 1025, 131_072, 7]), 2 ** (-1 / 32)
    values = torch.randn(int(lengths.sum()))
    found = suffix_scan(values.cuda(), gamma, lengths.cuda()).cpu().double()
    exact, absolute = (suffix_scan(terms, gamma, lengths) for terms in (values.double(), values.double().abs()))
    assert ((found - exact).abs() / absolute).max() < 1e-6


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_against_fp64(dtype: torch.dtype) -> None:
    """The kernels at a real vocabulary, a padded one, and a temperature; the gradient to the rounding of its type."""
    tokens, vocabulary, padded, temperature = 64, 151_936, 152_064, 0.7
    logits = (4 * torch.randn(1, tokens, padded, device="cuda")).to(dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, (1, tokens), device="cuda")
    weights = torch.randn(1, tokens, device="cuda")
    log_probs, entropy = log_probs_and_entropy(logits, labels, vocabulary, temperature)
    (gradient,) = torch.autograd.grad((log_probs * weights).sum(), logits)

    plain = (logits.double()[..., :vocabulary] / temperature).log_softmax(-1)
    expected = plain.gather(-1, labels[..., None])[..., 0]
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), logits)
    torch.testing.assert_close(log_probs, expected.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, -(plain.exp() * plain).sum(-1).float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-9)
    assert gradient[..., vocabulary:].abs().max() == 0


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("overwrite", [False, True])
def test_log_probs_hold_no_copy_in_fp32(overwrite: bool) -> None:
    """A gradient in the logits' own type, or none where it goes over the logits; log_softmax takes six times those."""
    tokens, vocabulary = 4096, 152_064
    hidden = torch.randn(1, tokens, 64, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(vocabulary, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, vocabulary, (1, tokens), device="cuda")
    logits = hidden @ weight.T
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    log_probs_and_entropy(logits, labels, vocabulary, overwrite=overwrite)[0].sum().backward()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < (0.1 if overwrite else 1.1) * logits.numel() * 2
