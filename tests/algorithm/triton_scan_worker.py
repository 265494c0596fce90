"""What test_triton_scan.py starts: compares the interpreted kernel with the torch path; the worst error comes last."""

import torch

from megatron_fipo.algorithm import triton_scan
from megatron_fipo.algorithm.credit import suffix_scan


def scaled_error(values: torch.Tensor, gamma: float, lengths: list[int]) -> float:
    """Greatest error, relative to the sum of the terms' absolute values where that is above 1."""
    stretches = torch.tensor(lengths)
    found = triton_scan.suffix_scan_on_cuda(values, gamma, stretches).double()
    expected = suffix_scan(values.double(), gamma, stretches)
    return ((found - expected).abs() / suffix_scan(values.double().abs(), gamma, stretches).clamp(min=1)).max().item()


def main() -> None:
    triton_scan.BLOCK = 64  # several blocks in a short stretch: the interpreter is slow
    torch.manual_seed(0)
    worst = 0.0
    for lengths in ([1], [63, 64, 65], [300, 1, 7, 128]):
        for decay_rate in (0.5, 32.0, 256.0):
            worst = max(worst, scaled_error(torch.randn(sum(lengths)), 2 ** (-1 / decay_rate), lengths))
    worst = max(worst, scaled_error(torch.randn(140, 2)[:, 0], 0.9, [70, 70]))
    empty = torch.empty(0)
    assert triton_scan.suffix_scan_on_cuda(empty, 0.9, empty.long()).shape == (0,)
    print(worst)


if __name__ == "__main__":
    main()
