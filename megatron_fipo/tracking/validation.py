"""Accuracy on held-out problems: avg@k, cons@k, pass@k over the k samples of each problem.

Choices worth knowing: a check that failed (timeout, crash) counts as not right in every score, and is also counted by
itself; answers vote as extracted strings, so `1/2` and `0.5` are two candidates.
"""

from collections import defaultdict
from dataclasses import dataclass
from math import comb
from statistics import fmean

from megatron_fipo.samples import Group, Judgement


@dataclass(frozen=True)
class ValidationScores:
    """Scores over a set of problems; accuracies in [0, 1], lengths in tokens."""

    problems: int
    k: int
    avg: float
    """avg@k: the mean accuracy of a single sample."""
    cons: float
    """cons@k: the accuracy of the majority's answer."""
    pass_at_k: float
    """pass@k: the chance that one of k samples is right."""
    response_length_mean: float
    truncated: float
    """Share of responses that the length limit cut off."""
    not_judged: int
    """Responses whose check timed out or crashed."""


@dataclass(frozen=True)
class ValidationResult:
    """The scores of all held-out problems, and of each data source among them (AIME24, AIME25 …)."""

    overall: ValidationScores
    by_source: dict[str, ValidationScores]

    def metrics(self) -> dict[str, float]:
        """Flat and ready for the metrics file: accuracy, cons_at_k …, and `accuracy/<source>` with several sources."""
        flat = _metrics(self.overall, suffix="")
        if len(self.by_source) > 1:
            for source, scores in self.by_source.items():
                flat |= _metrics(scores, suffix=f"/{source}")
        return flat


def score(groups: list[Group], k: int) -> ValidationResult:
    """Score judged groups of k samples or more.

    With more than k samples, avg@k and pass@k are the unbiased estimates from all of them, and cons@k votes among the
    first k. Raises ValueError for no group at all, and for one with fewer samples than k or without its judgements.
    """
    if not groups:
        raise ValueError("no problems to validate on")
    for group in groups:
        if len(group.responses) < k or len(group.judgements) != len(group.responses):
            counts = f"{len(group.responses)} responses and {len(group.judgements)} judgements"
            raise ValueError(f"problem {group.problem.id} has {counts}; validation needs {k} or more of both")
    by_source: dict[str, list[Group]] = defaultdict(list)
    for group in groups:
        by_source[group.problem.data_source].append(group)
    return ValidationResult(
        _scores(groups, k), {source: _scores(part, k) for source, part in sorted(by_source.items())}
    )


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The chance that k of `samples` responses, drawn without replacement, hold one of the `right` ones."""
    return 1.0 - comb(samples - right, k) / comb(samples, k)


def consensus(judgements: list[Judgement]) -> float:
    """Accuracy of the most frequent answer.

    Only judged, non-empty answers vote: to find no answer is not to agree. Without a vote the accuracy is 0. Tied
    answers share: the result is the mean of their accuracies, what a coin toss between them would give on average. An
    answer's accuracy is the mean over its voters (they differ only where a scorer also judges the form).
    """
    votes: dict[str, list[float]] = defaultdict(list)
    for judgement in judgements:
        if judgement.was_judged and judgement.answer.strip():
            votes[judgement.answer.strip()].append(judgement.accuracy)
    if not votes:
        return 0.0
    most = max(len(accuracies) for accuracies in votes.values())
    return fmean(fmean(accuracies) for accuracies in votes.values() if len(accuracies) == most)


def _scores(groups: list[Group], k: int) -> ValidationScores:
    responses = [response for group in groups for response in group.responses]
    judgements = [judgement for group in groups for judgement in group.judgements]
    return ValidationScores(
        problems=len(groups),
        k=k,
        avg=fmean(fmean(judgement.accuracy for judgement in group.judgements) for group in groups),
        cons=fmean(consensus(group.judgements[:k]) for group in groups),
        pass_at_k=fmean(pass_at_k(len(group.judgements), _right(group), k) for group in groups),
        response_length_mean=fmean(len(response.token_ids) for response in responses),
        truncated=fmean(response.finish_reason == "length" for response in responses),
        not_judged=sum(not judgement.was_judged for judgement in judgements),
    )


def _right(group: Group) -> int:
    # A scorer's partial credit is not a solved problem.
    return sum(judgement.accuracy >= 1.0 for judgement in group.judgements)


def _metrics(scores: ValidationScores, suffix: str) -> dict[str, float]:
    return {
        f"accuracy{suffix}": scores.avg,
        f"cons_at_k{suffix}": scores.cons,
        f"pass_at_k{suffix}": scores.pass_at_k,
        f"response_length_mean{suffix}": scores.response_length_mean,
        f"truncated{suffix}": scores.truncated,
        f"not_judged{suffix}": scores.not_judged,
    }
