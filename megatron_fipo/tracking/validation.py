"""Accuracy on held-out problems: avg@k, cons@k, pass@k over the k samples of each problem.

Choices worth knowing: a response whose check failed (timeout, crash) counts in no accuracy, only in the rates of failed
checks, and a problem without any verdict is left out of the means; answers vote as extracted strings, so `1/2` and
`0.5` are two candidates.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from math import comb, nan
from statistics import fmean

from megatron_fipo.samples import FAILED_CHECKS, Group, Judgement


@dataclass(frozen=True)
class ValidationScores:
    """Scores over a set of problems; accuracies in [0, 1], or NaN without any verdict; lengths in tokens."""

    problems: int
    problems_not_judged: int
    """Problems without any verdict, which the accuracies leave out."""
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
    failed_rates: dict[str, float]
    """Share of responses a kind of failed check."""


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

    With more than k verdicts on a problem, avg@k and pass@k are the unbiased estimates from all of them, and cons@k
    votes among the first k; with fewer, since checks failed, all three are of those there are.

    Raises:
        ValueError: no group at all, or one with fewer samples than k or without its judgements.
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
    verdicts = [[judgement for judgement in group.judgements if judgement.was_judged] for group in groups]
    judged = [of_problem for of_problem in verdicts if of_problem]
    outcomes = Counter(judgement.outcome for group in groups for judgement in group.judgements)
    return ValidationScores(
        problems=len(groups),
        problems_not_judged=len(groups) - len(judged),
        k=k,
        avg=_mean(fmean(judgement.accuracy for judgement in of_problem) for of_problem in judged),
        cons=_mean(consensus(of_problem[:k]) for of_problem in judged),
        pass_at_k=_mean(
            pass_at_k(len(of_problem), _right(of_problem), min(k, len(of_problem))) for of_problem in judged
        ),
        response_length_mean=fmean(len(response.token_ids) for response in responses),
        truncated=fmean(response.finish_reason == "length" for response in responses),
        not_judged=sum(outcomes[kind] for kind in FAILED_CHECKS),
        failed_rates={kind: outcomes[kind] / len(responses) for kind in FAILED_CHECKS},
    )


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return fmean(found) if found else nan


def _right(judgements: list[Judgement]) -> int:
    # A scorer's partial credit is not a solved problem.
    return sum(judgement.accuracy >= 1.0 for judgement in judgements)


def _metrics(scores: ValidationScores, suffix: str) -> dict[str, float]:
    return {
        f"accuracy{suffix}": scores.avg,
        f"cons_at_k{suffix}": scores.cons,
        f"pass_at_k{suffix}": scores.pass_at_k,
        f"response_length_mean{suffix}": scores.response_length_mean,
        f"truncated{suffix}": scores.truncated,
        f"not_judged{suffix}": scores.not_judged,
        **{f"verifier_{kind}_rate{suffix}": rate for kind, rate in scores.failed_rates.items()},
    }
