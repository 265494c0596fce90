"""The future-KL credit: our suffix scan against a chunked matrix product, the way of the released code.

    python -m benchmarks.credit

The chunked product is written here after the description of the released code: for each chunk of 128 later tokens, the
powers of γ between every token and the chunk, times the chunk. O(T²) work, O(T · 128) memory.
"""

import torch
from torch import Tensor

from benchmarks.measure import device, machine, once, peak_bytes, seconds
from megatron_fipo.algorithm.credit import future_kl

DECAY_RATE = 32.0
CHUNK = 128
SHAPES = [(1, 2048), (1, 8192), (1, 32_768), (1, 131_072), (8, 20_480)]


def chunked_matmul(values: Tensor, decay_rate: float) -> Tensor:
    """F_t of [rows, tokens] values, by products of [rows, 128] with [128, tokens] matrices of powers."""
    gamma = torch.tensor(2.0 ** (-1.0 / decay_rate), dtype=values.dtype, device=values.device)
    tokens = values.shape[1]
    position = torch.arange(tokens, device=values.device)
    total = torch.zeros_like(values)
    for start in range(0, tokens, CHUNK):
        later = position[start : start + CHUNK]
        distance = later[None, :] - position[:, None]
        powers = torch.where(distance >= 0, gamma ** distance.clamp(min=0), 0.0)
        total += values[:, start : start + CHUNK] @ powers.T
    return total


def main() -> None:
    """Print the table in Markdown."""
    torch.set_num_threads(1)
    print(f"{machine()}\n")
    print("| rows × tokens | scan, ms | chunked, ms | faster | scan, MiB | chunked, MiB | largest difference |")
    print("|---|---|---|---|---|---|---|")
    for rows, tokens in SHAPES:
        values = torch.randn(rows, tokens, device=device()) * 0.02
        found, expected = future_kl(values, DECAY_RATE), torch.empty(0)

        def chunked(values: Tensor = values) -> None:
            nonlocal expected
            expected = chunked_matmul(values, DECAY_RATE)

        ours = seconds(lambda values=values: future_kl(values, DECAY_RATE))
        theirs = once(chunked) if tokens > 16_384 else seconds(chunked)
        ours_peak = peak_bytes(lambda values=values: future_kl(values, DECAY_RATE)) / 2**20
        # Its memory does not depend on how many chunks follow: the first few show the peak.
        theirs_peak = peak_bytes(chunked) / 2**20 if tokens <= 32_768 and rows == 1 else None
        shown = f"{theirs_peak:.1f}" if theirs_peak is not None else "–"
        print(
            f"| {rows} × {tokens} | {1e3 * ours:.2f} | {1e3 * theirs:.0f} | {theirs / ours:.0f}× "
            f"| {ours_peak:.1f} | {shown} | {(found - expected).abs().max():.1e} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
