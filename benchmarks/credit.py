"""Compare two ways to compute future-KL credit: our suffix scan, and a chunked matrix product as in the released code.

    python -m benchmarks.credit

The chunked product is written here following the description of the released code: for each chunk of 128 later tokens,
the matrix of powers of γ between every token and the chunk, times the chunk. It takes O(T²) work and O(T · 128) memory.
"""

import torch
from torch import Tensor

from benchmarks.measure import device, machine, once, peak_bytes, seconds
from megatron_fipo.algorithm.credit import future_kl
from megatron_fipo.algorithm.sequences import SequenceLayout

DECAY_RATE = 32.0
CHUNK = 128
SHAPES = [(1, 2048), (1, 8192), (8, 20_480), (1, 32_768), (1, 131_072)]
SAMPLED = 16
"""At 131072 tokens only one chunk in 16 is timed, and the time multiplied by 16: the whole would take minutes."""


def chunked_matmul(values: Tensor, decay_rate: float, parts: int = 1) -> Tensor:
    """Compute F_t of [rows, tokens] values, by products of [rows, 128] with [128, tokens] matrices of powers.

    With `parts` > 1 only one of `parts` chunks is computed. This takes that share of the time, since every chunk costs
    the same. The result is then meaningless.
    """
    gamma = torch.tensor(2.0 ** (-1.0 / decay_rate), dtype=values.dtype, device=values.device)
    tokens = values.shape[1]
    position = torch.arange(tokens, device=values.device)
    total = torch.zeros_like(values)
    for start in range(0, tokens, CHUNK * parts):
        later = position[start : start + CHUNK]
        distance = later[None, :] - position[:, None]
        powers = torch.where(distance >= 0, gamma ** distance.clamp(min=0), 0.0)
        total += values[:, start : start + CHUNK] @ powers.T
    return total


def main() -> None:
    """Print the table in Markdown."""
    torch.set_num_threads(1)
    print(f"{machine()}\n")
    print("| rows × tokens | scan, ms | chunked, ms | faster | scan, MiB | chunked, MiB |")
    print("|---|---|---|---|---|---|")
    for rows, tokens in SHAPES:
        values = torch.randn(rows, tokens, device=device()) * 0.02
        parts = SAMPLED if tokens > 65_536 else 1

        def ours(values: Tensor = values) -> Tensor:
            return future_kl(values, DECAY_RATE, SequenceLayout())

        def theirs(values: Tensor = values, parts: int = parts) -> Tensor:
            return chunked_matmul(values, DECAY_RATE, parts)

        if tokens <= 2048:
            torch.testing.assert_close(ours(), theirs(), rtol=1e-5, atol=1e-6)
        time_ours = seconds(ours)
        time_theirs = parts * (seconds(theirs) if tokens <= 8192 else once(theirs))
        peaks = [peak_bytes(way) / 2**20 for way in (ours, lambda values=values: theirs(values, SAMPLED))]
        print(
            f"| {rows} × {tokens} | {1e3 * time_ours:.2f} | {1e3 * time_theirs:.0f} | {time_theirs / time_ours:.0f}× "
            f"| {peaks[0]:.1f} | {peaks[1]:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
