"""Accuracy on held-out problems: avg@k, cons@k, pass@k over the k samples of each problem.

Training and `evaluate` score problems by this module, and write the scores of each problem. `compare` computes
intervals from these files.

A response whose check failed (timeout, crash) counts in no accuracy, only in the rates of failed checks. A problem
without any verdict is left out of the means. Answers vote as the strings that the rule has extracted. If it extracts
none, as the rule of programs, there is no cons@k.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import comb, isnan, nan
from statistics import fmean

from megatron_fipo.records.sample import FAILED_CHECKS, Group, RewardResult


@dataclass(frozen=True)
class ProblemScores:
    """The scores of one problem. The three accuracies are in [0, 1], or NaN without any verdict."""

    problem: str
    """The problem's id, a hash of its prompt: the same in every run with this prompt."""
    data_source: str
    samples: int
    judged: int
    """Samples with a verdict. The checks of the others timed out or crashed."""
    right: int
    """Samples that are fully right."""
    accuracy: float
    """The mean accuracy of the judged samples."""
    cons: float
    """NaN also if no judged sample has an answer."""
    pass_at_k: float
    tokens: int
    """Total length of all responses."""
    truncated: int
    """Responses that the length limit cut off."""
    timeout: int
    crash: int


@dataclass(frozen=True)
class ValidationScores:
    """Scores over a set of problems; accuracies in [0, 1], or NaN without any verdict; lengths in tokens."""

    problems: int
    problems_not_judged: int
    """Problems without any verdict, which are left out of the accuracies."""
    k: int
    avg: float
    """avg@k: the mean accuracy of a single sample."""
    cons: float
    """cons@k: the accuracy of the most frequent answer; NaN if responses are right and none has an answer."""
    pass_at_k: float
    """pass@k: the probability that at least one of k samples is right."""
    response_length_mean: float
    truncated: float
    """Share of responses that the length limit cut off."""
    not_judged: int
    """Responses whose check timed out or crashed."""
    failed_rates: dict[str, float]
    """Share of responses for each kind of failed check."""


@dataclass(frozen=True)
class ValidationResult:
    """The scores of all held-out problems, and of each data source among them (AIME24, AIME25 …)."""

    overall: ValidationScores
    by_source: dict[str, ValidationScores]
    problems: list[ProblemScores]

    def metrics(self) -> dict[str, float]:
        """Return flat metrics for the metrics file: accuracy, cons_at_k … If needed, also `accuracy/<source>`."""
        flat = _metrics(self.overall, suffix="")
        if len(self.by_source) > 1:
            for source, scores in self.by_source.items():
                flat |= _metrics(scores, suffix=f"/{source}")
        return flat


def score(groups: list[Group], k: int) -> ValidationResult:
    """Score judged groups of k samples or more.

    If a problem has more than k verdicts, avg@k and pass@k are the unbiased estimates from all of them, and cons@k is
    the vote among the first k. If it has fewer, because checks failed, all three use the verdicts that there are.

    Raises:
        ValueError: there is no group, or a group has fewer than k samples or is not judged.
    """
    if not groups:
        raise ValueError("no problems to validate on")
    for group in groups:
        if len(group.samples) < k:
            raise ValueError(
                f"problem {group.problem.id} has {len(group.samples)} samples; validation needs {k} or more"
            )
    return combine([score_group(group, k) for group in groups], k)


def score_group(group: Group, k: int) -> ProblemScores:
    """Return the scores of one problem's judged samples."""
    truncated = sum(sample.finish_reason == "length" for sample in group.samples)
    tokens = sum(sample.actions for sample in group.samples)
    return score_problem(group.problem.id, group.problem.data_source, group.results, tokens, truncated, k)


def score_problem(
    problem: str, data_source: str, results: Sequence[RewardResult], tokens: int, truncated: int, k: int
) -> ProblemScores:
    """Do the work of `score_group`. `tokens` is the total length of all responses; `truncated` counts those cut off."""
    verdicts = [result for result in results if result.was_judged]
    outcomes = Counter(result.outcome for result in results)
    right, judged = _right(verdicts), len(verdicts)
    return ProblemScores(
        problem=problem,
        data_source=data_source,
        samples=len(results),
        judged=judged,
        right=right,
        accuracy=_mean(result.accuracy for result in verdicts),
        cons=consensus(verdicts[:k]),
        pass_at_k=pass_at_k(judged, right, min(k, judged)) if verdicts else nan,
        tokens=tokens,
        truncated=truncated,
        timeout=outcomes["timeout"],
        crash=outcomes["crash"],
    )


def combine(problems: list[ProblemScores], k: int) -> ValidationResult:
    """Return the scores over all problems and for each data source. ValueError if there are no problems."""
    if not problems:
        raise ValueError("no problems to validate on")
    by_source: dict[str, list[ProblemScores]] = defaultdict(list)
    for problem in problems:
        by_source[problem.data_source].append(problem)
    of_source = {source: _scores(part, k) for source, part in sorted(by_source.items())}
    return ValidationResult(_scores(problems, k), of_source, problems)


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Return the probability that k of `samples` responses, drawn without replacement, contain one of the `right` ones.

    The unbiased estimator of Chen et al., Evaluating Large Language Models Trained on Code (2021), in exact integers.
    """
    return 1.0 - comb(samples - right, k) / comb(samples, k)


def consensus(results: Sequence[RewardResult]) -> float:
    """Return the accuracy of the most frequent answer.

    Only judged, non-empty answers vote: two responses without an answer do not agree. Without any vote it is NaN. If
    several answers are equally frequent, the result is the mean of their accuracies, as if one were chosen at random.
    The accuracy of an answer is the mean over its voters. These differ only if a scorer also judges the form.
    """
    votes: dict[str, list[float]] = defaultdict(list)
    for result in results:
        if result.was_judged and result.answer.strip():
            votes[result.answer.strip()].append(result.accuracy)
    if not votes:
        return nan
    most = max(len(accuracies) for accuracies in votes.values())
    return fmean(fmean(accuracies) for accuracies in votes.values() if len(accuracies) == most)


def consensuses(judged: Sequence[ProblemScores]) -> list[float]:
    """Return the problems' cons, in which one without a vote counts as 0.

    Empty if responses are right and none has an answer: the rule gives none. Where none is right, it may give some.
    """
    found = [problem.cons for problem in judged]
    return (
        []
        if all(map(isnan, found)) and any(problem.right for problem in judged)
        else [0.0 if isnan(cons) else cons for cons in found]
    )


def _scores(problems: list[ProblemScores], k: int) -> ValidationScores:
    judged = [problem for problem in problems if problem.judged]
    samples = sum(problem.samples for problem in problems)
    failed = {kind: sum(getattr(problem, kind) for problem in problems) for kind in FAILED_CHECKS}
    return ValidationScores(
        problems=len(problems),
        problems_not_judged=len(problems) - len(judged),
        k=k,
        avg=_mean(problem.accuracy for problem in judged),
        cons=_mean(consensuses(judged)),
        pass_at_k=_mean(problem.pass_at_k for problem in judged),
        response_length_mean=sum(problem.tokens for problem in problems) / samples,
        truncated=sum(problem.truncated for problem in problems) / samples,
        not_judged=sum(failed.values()),
        failed_rates={kind: count / samples for kind, count in failed.items()},
    )


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return fmean(found) if found else nan


def _right(results: Sequence[RewardResult]) -> int:
    # A response with partial credit does not solve the problem.
    return sum(result.accuracy >= 1.0 for result in results)


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
