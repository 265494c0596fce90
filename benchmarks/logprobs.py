"""Measure peak memory and time of log-probs at a vocabulary of 152k, forward and backward: ours and log_softmax.

python -m benchmarks.logprobs
"""

import functools

import torch
from torch import Tensor

from benchmarks.measure import device, machine, once, peak_bytes
from megatron_fipo.policy.logprobs import log_probs_and_entropy

VOCABULARY = 152_064
TOKENS = [512, 1024, 2048]


def plain(logits: Tensor, labels: Tensor) -> None:
    """Compute log-probs and entropy by fp32 log_softmax of all logits."""
    log_probs = logits.float().log_softmax(-1)
    with torch.no_grad():
        _ = -(log_probs.exp() * log_probs).sum(-1)
    log_probs.gather(-1, labels[..., None]).sum().backward()


def ours(logits: Tensor, labels: Tensor) -> None:
    """Compute the same by policy/logprobs.py."""
    log_probs_and_entropy(logits, labels, VOCABULARY)[0].sum().backward()


def main() -> None:
    """Print the table in Markdown."""
    torch.set_num_threads(1)
    print(f"{machine()}; bf16 logits, gradient included in the peak\n")
    print("| tokens | logits, MiB | ours: peak, MiB | log_softmax: peak, MiB | less | ours, s | log_softmax, s |")
    print("|---|---|---|---|---|---|---|")
    for tokens in TOKENS:
        labels = torch.randint(0, VOCABULARY, (1, tokens), device=device())
        peaks, times = [], []
        for way in (ours, plain):
            logits = torch.randn(1, tokens, VOCABULARY, device=device(), dtype=torch.bfloat16).requires_grad_()
            peaks.append(peak_bytes(functools.partial(way, logits, labels)) / 2**20)
            logits.grad = None
            times.append(once(functools.partial(way, logits, labels)))
            size = logits.numel() * logits.element_size() / 2**20
            del logits
        print(
            f"| {tokens} | {size:.0f} | {peaks[0]:.0f} | {peaks[1]:.0f} | {peaks[1] / peaks[0]:.1f}× "
            f"| {times[0]:.1f} | {times[1]:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
