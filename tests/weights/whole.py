"""Weights for tests: tensors that are whole here, and a stage's tensors gathered whole."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_fipo.weights.buckets import Bucket
from megatron_fipo.weights.transfer_plan import cut_by_size

NamedTensors = Sequence[tuple[str, Tensor]]


@dataclass(frozen=True)
class WholeWeights:
    """Tensors that are whole in this process, as a sender's weights. `before` is called with each bucket's index."""

    tensors: NamedTensors
    bucket_bytes: int = 1 << 20
    before: Callable[[int], None] = lambda index: None

    @property
    def _cuts(self) -> list[tuple[int, int]]:
        return cut_by_size([tensor.nbytes for _, tensor in self.tensors], self.bucket_bytes)

    @property
    def buckets(self) -> int:
        return len(self._cuts)

    def gather(self, index: int) -> Bucket:
        self.before(index)
        start, end = self._cuts[index]
        return Bucket(list(self.tensors[start:end]))


def stage_tensors(chunks: Sequence[Any], model_config: Any, bucket_bytes: int = 40_000) -> dict[str, Tensor]:
    """This pipeline stage's tensors, whole, of experts this rank's. Its tensor-parallel groups call this together."""
    from megatron_fipo.weights.gather import HeldWeights

    weights = HeldWeights(chunks, model_config, bucket_bytes)
    return dict(pair for part in weights.parts for index in range(part.buckets) for pair in part.gather(index).tensors)
