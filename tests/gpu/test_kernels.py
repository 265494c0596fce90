"""Credit and log-probs on CUDA against the CPU, which tests/algorithm and tests/policy hold against the formulas."""

import pytest
import torch

from megatron_fipo.algorithm.credit import suffix_scan
from megatron_fipo.policy.logprobs import log_probs_and_entropy

pytestmark = pytest.mark.gpu


@pytest.mark.usefixtures("triton")
def test_suffix_scan() -> None:
    lengths, gamma = torch.tensor([20_480, 1, 1024, 1023, 1025, 131_072, 7]), 2 ** (-1 / 32)
    values = torch.randn(int(lengths.sum()))
    found = suffix_scan(values.cuda(), gamma, lengths.cuda()).cpu()
    torch.testing.assert_close(found, suffix_scan(values, gamma, lengths), rtol=1e-4, atol=1e-4)


def test_log_probs_in_bfloat16() -> None:
    logits = torch.randn(2, 300, 1000).bfloat16()
    labels, weights = torch.randint(0, 990, (2, 300)), torch.randn(2, 300)
    results = []
    for device in ("cpu", "cuda"):
        leaf = logits.to(device).requires_grad_()
        log_probs, entropy = log_probs_and_entropy(leaf, labels.to(device), 990)
        (gradient,) = torch.autograd.grad((log_probs * weights.to(device)).sum(), leaf)
        results.append([tensor.detach().cpu() for tensor in (log_probs, entropy, gradient)])
    for on_cpu, on_cuda in zip(*results, strict=True):
        torch.testing.assert_close(on_cuda, on_cpu, rtol=2e-2, atol=1e-4)


def test_log_probs_hold_no_full_vocabulary_copy_in_fp32() -> None:
    tokens, vocabulary = 4096, 152_064
    logits = torch.randn(1, tokens, vocabulary, device="cuda", dtype=torch.bfloat16).requires_grad_()
    labels = torch.randint(0, vocabulary, (1, tokens), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    log_probs_and_entropy(logits, labels, vocabulary)[0].sum().backward()
    extra = torch.cuda.max_memory_allocated() - before
    gradient = logits.numel() * 2
    assert extra < 2.5 * gradient, "one bf16 gradient and chunks; log_softmax in fp32 would take 4 more"
