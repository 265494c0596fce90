"""What test_triton_scan.py starts: compares the interpreted kernel with the torch path; the worst error comes last."""

import torch

from megatron_fipo.algorithm import triton_scan
from megatron_fipo.algorithm.credit import suffix_scan


def scaled_error(values: torch.Tensor, gamma: float) -> float:
    """Greatest error, relative to the sum of the terms' absolute values where that is above 1."""
    found = triton_scan.suffix_scan_on_cuda(values, gamma).double()
    expected = suffix_scan(values.double(), gamma)
    return ((found - expected).abs() / suffix_scan(values.double().abs(), gamma).clamp(min=1)).max().item()


def main() -> None:
    triton_scan.BLOCK = 64  # several blocks in a short row: the interpreter is slow
    torch.manual_seed(0)
    worst = 0.0
    for tokens in (1, 63, 64, 65, 300):
        for decay_rate in (0.5, 32.0, 256.0):
            worst = max(worst, scaled_error(torch.randn(3, tokens), 2 ** (-1 / decay_rate)))
    worst = max(worst, scaled_error(torch.randn(70, 4).t(), 0.9))
    assert triton_scan.suffix_scan_on_cuda(torch.empty(2, 0), 0.9).shape == (2, 0)
    print(worst)


if __name__ == "__main__":
    main()
