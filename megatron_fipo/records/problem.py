"""A problem: one prompt of a dataset, tokenised."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy

from megatron_fipo.records.streams import read_only


@dataclass(frozen=True, eq=False)
class Problem:
    """One prompt of a dataset, tokenised."""

    id: str
    """Stable name: the same problem has the same id in every run (a hash of its text)."""
    text: str
    """The prompt as the model reads it, chat template applied."""
    token_ids: numpy.ndarray
    """[prompt] int32, read-only."""
    ground_truth: str
    data_source: str
    extra: dict[str, Any] = field(default_factory=dict)
    """What the reward function needs beyond the answer: a reasoning-gym entry."""
    columns: str = "{}"
    """All columns of the problem's row as a JSON object: a text, which takes a fraction of the object's memory."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Problem):
            return NotImplemented
        ours, theirs = (
            (each.id, each.text, each.ground_truth, each.data_source, each.extra, each.columns)
            for each in (self, other)
        )
        return ours == theirs and numpy.array_equal(self.token_ids, other.token_ids)


def prompt_ids(token_ids: Sequence[int] | numpy.ndarray) -> numpy.ndarray:
    """A prompt's token ids as Problem has them. OverflowError for an id that is no 32-bit number."""
    return read_only(numpy.array(token_ids, numpy.int32))
