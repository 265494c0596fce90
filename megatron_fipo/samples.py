"""What travels through the loop on rank 0: a problem, its sampled responses and their judgements. Without torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy

FAILED_CHECKS = ("timeout", "crash")
"""Outcomes of a check that came to no verdict."""


@dataclass
class Problem:
    """One prompt of a dataset, tokenised."""

    id: str
    """Stable name: the same problem has the same id in every run (a hash of its text)."""
    text: str
    """The prompt as the model reads it, chat template applied."""
    token_ids: list[int]
    ground_truth: str
    data_source: str
    extra: dict[str, Any] = field(default_factory=dict)
    """What the reward rule needs beyond the answer: a reasoning-gym entry."""
    columns: str = "{}"
    """All columns of the problem's row as a JSON object: a text, which takes a fraction of the object's memory."""


@dataclass(frozen=True, eq=False)
class Response:
    """One sampled continuation, as the engine returned it. Its arrays are read-only."""

    token_ids: numpy.ndarray
    """[n] int32: the response alone, its end-of-sequence token included when it has one."""
    log_probs: numpy.ndarray
    """[n] float32: the engine's log-probability of each token."""
    finish_reason: str
    """stop, or length when max_response_length cut it off."""
    weight_version: int
    """The version of the weights that sampled it."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Response):
            return NotImplemented
        return (
            (self.finish_reason, self.weight_version) == (other.finish_reason, other.weight_version)
            and numpy.array_equal(self.token_ids, other.token_ids)
            and numpy.array_equal(self.log_probs, other.log_probs)
        )

    @classmethod
    def from_lists(
        cls, token_ids: Sequence[int], log_probs: Sequence[float], finish_reason: str, weight_version: int
    ) -> "Response":
        """The same of plain lists. OverflowError for a token id that is no 32-bit number; a log-prob may become inf."""
        with numpy.errstate(over="ignore"):
            arrays = numpy.array(token_ids, numpy.int32), numpy.array(log_probs, numpy.float32)
        for array in arrays:
            array.flags.writeable = False
        return cls(*arrays, finish_reason, weight_version)


@dataclass
class Judgement:
    """The verdict on one response."""

    accuracy: float
    """1 right, 0 wrong; fractions where a scorer gives them. Says nothing unless `was_judged`."""
    reward: float
    """What the advantage is computed from: correct/incorrect plus the overlong penalty. Likewise."""
    answer: str
    """What was extracted, for consensus voting and for readers."""
    outcome: str
    """judged; too_long, an answer above the rule's limit, which is wrong; or one of FAILED_CHECKS."""
    extra: dict[str, float | str] = field(default_factory=dict)
    """What else a reward of the user's own said, by its names: numbers become metrics."""

    @property
    def was_judged(self) -> bool:
        """Whether this is a verdict: a check that failed is not a wrong answer, in training and in metrics."""
        return self.outcome not in FAILED_CHECKS


@dataclass
class Group:
    """All samples of one problem: the unit of advantages and of dynamic sampling."""

    problem: Problem
    responses: list[Response]
    judgements: list[Judgement] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    """The responses decoded, for rewards and for readers."""
