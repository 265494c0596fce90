"""What travels through the loop on rank 0: a problem, its sampled responses and their judgements. Plain Python."""

from dataclasses import dataclass, field
from typing import Any

FAILED_CHECKS = ("timeout", "crash")
"""Outcomes of a check that came to no verdict."""

LARGEST_REWARD = 1e6
"""Most that a reward of the user's own may be, above or below 0: far below what overflows in training."""


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


@dataclass
class Response:
    """One sampled continuation, as the engine returned it."""

    token_ids: list[int]
    """The response alone, its end-of-sequence token included when it has one."""
    log_probs: list[float]
    """The engine's log-probability of each token."""
    finish_reason: str
    """stop, or length when max_response_length cut it off."""
    weight_version: int
    """The version of the weights that sampled it."""


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
