"""An evaluation's results: scores with intervals, for each data set and all together, as JSON and as a table."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.table import Table

from megatron_fipo.evaluation.files import ALL
from megatron_fipo.evaluation.sample_file import SampledProblem
from megatron_fipo.tracking.console_table import tenths
from megatron_fipo.tracking.intervals import LEVEL, Values, mean_interval
from megatron_fipo.tracking.validation import ProblemScores, ValidationScores, combine, consensuses, pass_at_k


def summarise(sampled: Sequence[SampledProblem], k: int) -> dict[str, Any]:
    """Return the scores of all problems under "all", and of each data source by its name, ready for JSON.

    An interval is over problems: it shows how the score would vary with other problems of the same kind. If no response
    could be judged, there are no accuracies.
    """
    problems = [problem.scores(k) for problem in sampled]
    result = combine(problems, k)
    parts = {ALL: result.overall} | result.by_source
    return {name: _part(name, scores, sampled, problems) for name, scores in parts.items()}


def _part(
    name: str, scores: ValidationScores, sampled: Sequence[SampledProblem], problems: list[ProblemScores]
) -> dict[str, Any]:
    chosen = [index for index, problem in enumerate(problems) if name in (ALL, problem.data_source)]
    judged = [problems[index] for index in chosen if problems[index].judged]
    lengths = np.array([sample.tokens for index in chosen for sample in sampled[index].samples])
    quantiles = np.quantile(lengths, [0.1, 0.5, 0.9])
    solved = [problem.right / problem.judged for problem in judged]
    return {
        "problems": scores.problems,
        "problems_not_judged": scores.problems_not_judged,
        "samples": scores.k,
        "avg_at_k": _interval([problem.accuracy for problem in judged]),
        "cons_at_k": _interval(consensuses(judged)),
        "pass_at": {str(draws): _pass_at(judged, draws) for draws in _powers_of_two(scores.k)},
        "always_right": sum(share == 1 for share in solved),
        "sometimes_right": sum(0 < share < 1 for share in solved),
        "never_right": sum(share == 0 for share in solved),
        "response_length": {
            "mean": scores.response_length_mean,
            **{label: float(value) for label, value in zip(("p10", "p50", "p90"), quantiles, strict=True)},
            "longest": int(lengths.max()),
        },
        "truncated": scores.truncated,
        "not_judged": scores.not_judged,
    }


def _powers_of_two(k: int) -> list[int]:
    """Return 1, 2, 4 … and k itself."""
    return sorted({1 << power for power in range(k.bit_length())} | {k})


def _pass_at(judged: list[ProblemScores], draws: int) -> dict[str, float | None] | None:
    # If some checks of a problem failed, there are fewer samples to draw from.
    return _interval([pass_at_k(problem.judged, problem.right, min(draws, problem.judged)) for problem in judged])


def _interval(values: list[float]) -> dict[str, float | None] | None:
    if not values:
        return None
    scores: Values = np.array([values])
    found = mean_interval(scores)
    return {"value": found.mean, "low": found.low, "high": found.high}


def table(results: dict[str, Any]) -> Table:
    """Return a row for each data set, and one for all if there are several."""
    named = [name for name in results if name != ALL]
    rows = named if len(named) == 1 else [*named, ALL]
    k = results[ALL]["samples"]
    shown = Table(box=None, pad_edge=False, header_style="bold")
    shown.caption = f"[ ]: {LEVEL:.0%} interval over problems; length in tokens"
    shown.caption_justify = "left"
    scores = {"avg_at_k": f"avg@{k}", "cons_at_k": f"cons@{k}", "pass_at": f"pass@{k}"}
    if k == 1:  # with one sample per problem, cons@k and pass@k are the same as avg@k
        scores = {"avg_at_k": scores["avg_at_k"]}
    elif results[ALL]["cons_at_k"] is None and results[ALL]["avg_at_k"] is not None:  # the rule gives no answers
        del scores["cons_at_k"]
    for title in ("data set", "problems", *scores.values(), "length", "truncated"):
        shown.add_column(title, justify="left" if title == "data set" else "right")
    for name in rows:
        part = results[name]
        cells = [in_words(part[key][str(k)] if key == "pass_at" else part[key]) for key in scores]
        length = tenths(part["response_length"]["mean"])
        shown.add_row(name, str(part["problems"]), *cells, length, f"{part['truncated']:.1%}")
    return shown


def in_words(share: dict[str, float | None] | None) -> str:
    """Return a text such as 0.533 [0.36 0.70]; a dash if nothing could be judged."""
    if share is None or share["value"] is None:
        return "-"
    if share["low"] is None or share["high"] is None:
        return f"{share['value']:.3f}"
    return f"{share['value']:.3f} [{share['low']:.2f} {share['high']:.2f}]"
