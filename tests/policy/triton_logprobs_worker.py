"""What test_logprobs.py starts: compares the interpreted kernels with the torch path; the worst error comes last."""

import torch

from megatron_fipo.policy import logprobs, triton_logprobs


def errors(dtype: torch.dtype, width: int, valid: int, temperature: float) -> list[float]:
    """Greatest differences of statistics and gradient, the latter in units of what its type can tell apart."""
    tokens = 7
    logits = (3 * torch.randn(tokens, width + 5)).to(dtype)[:, :width]  # rows that are not next to each other
    labels = torch.randint(0, valid, (tokens,))
    labels[2] = -1
    maxima, sums = triton_logprobs.statistics_on_cuda(logits, labels, valid, temperature)
    expected_maxima, expected_sums = logprobs.statistics(logits, labels, valid, temperature)
    normaliser, scale = expected_maxima + expected_sums[0].log(), torch.randn(tokens)
    scale[4] = 0.0
    expected, found = (torch.full((tokens, width), float("nan"), dtype=dtype) for _ in range(2))
    logprobs.write_gradient(logits, labels, normaliser, scale, valid, temperature, expected)
    triton_logprobs.gradient_on_cuda(logits, labels, normaliser, scale, valid, temperature, found)
    over = logits.clone()
    triton_logprobs.gradient_on_cuda(over, labels, normaliser, scale, valid, temperature, over)
    assert torch.equal(over, found), "written over the logits it is the same"
    differences = [maxima - expected_maxima, (sums - expected_sums) / expected_sums.abs().clamp(min=1)]
    differences.append((found - expected).float() / torch.finfo(dtype).eps * 1e-7)
    return [difference.abs().max().item() for difference in differences]


def main() -> None:
    triton_logprobs.BLOCK = 64  # several blocks in a short row: the interpreter is slow
    torch.manual_seed(0)
    worst = 0.0
    for dtype in (torch.float32, torch.bfloat16):
        for width, valid in ((64, 64), (200, 200), (200, 137), (65, 1), (3, 2)):
            worst = max(worst, *errors(dtype, width, valid, temperature=0.7))
    empty = torch.empty(0, 5)
    assert triton_logprobs.statistics_on_cuda(empty, torch.empty(0).long(), 5, 1.0)[1].shape == (3, 0)
    print(worst)


if __name__ == "__main__":
    main()
