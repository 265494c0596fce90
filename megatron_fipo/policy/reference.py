"""The weights that training started from, for a KL term against them: kept in the host's memory, put in place to score.

A second model on the GPU would cost what no layout has to spare; a swap costs three copies of this rank's
weights a step.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


class ReferenceWeights:
    """This rank's part of the reference policy."""

    def __init__(self, chunks: Sequence[nn.Module]):
        """Keep a copy of what the chunks hold now."""
        self._parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
        self._kept = _to_host(self._parameters)

    @contextmanager
    @torch.no_grad()
    def in_place(self) -> Iterator[None]:
        """Inside, the chunks hold the reference's weights; afterwards their own again, bit for bit."""
        present = _to_host(self._parameters)
        try:
            _put(self._parameters, self._kept)
            yield
        finally:
            _put(self._parameters, present)


def _to_host(parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
    return [parameter.detach().to("cpu", copy=True) for parameter in parameters]


def _put(parameters: Sequence[nn.Parameter], values: Sequence[torch.Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data.copy_(value)
