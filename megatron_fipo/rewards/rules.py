"""How a response is judged: one function a rule, from texts to an accuracy. Runs in the verifier's processes.

A rule returns a verdict or raises; it never turns its own failure into "wrong". The heavy libraries are imported where
they are used, so that a worker of the exact-match rule stays small and starts at once. Neither torch nor numpy here.
"""

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from megatron_fipo.rewards import extraction

# The recipe looks for the answer only at the end: an early "Answer:" in a long response is not its conclusion.
_TAIL_CHARACTERS = 300
_INTEGER = re.compile(r"[+-]?\d{1,100}")


@dataclass(frozen=True)
class Verdict:
    """What a rule found."""

    accuracy: float
    """From 0, wrong, to 1, right."""
    answer: str
    """The extracted answer in its normal form, for consensus voting; empty where there is none."""


Rule = Callable[[str, str, dict[str, Any]], Verdict]
"""(response text, ground truth, the problem's `extra`) → verdict."""


def exact_match(text: str, ground_truth: str, extra: dict[str, Any]) -> Verdict:
    """The recipe's rule: the last "Answer: …" of the last 300 characters, compared as a normalised string."""
    answer = extraction.last_answer_line(text[-_TAIL_CHARACTERS:])
    if answer is None:
        return Verdict(0.0, "")
    normalised = extraction.normalise_answer(answer)
    return Verdict(float(normalised == extraction.normalise_answer(ground_truth)), normalised)


def math_verify(text: str, ground_truth: str, extra: dict[str, Any]) -> Verdict:
    r"""Mathematical equivalence by sympy of the last "Answer: …" line, or else of the last \boxed{…}.

    Equal normalised strings are right and two different integers are wrong without asking sympy.
    """
    answer = extraction.last_answer_line(text)
    answer = extraction.last_boxed(text) if answer is None else (extraction.last_boxed(answer) or answer)
    if answer is None:
        return Verdict(0.0, "")
    normalised, truth = extraction.normalise_answer(answer), extraction.normalise_answer(ground_truth)
    if normalised == truth and normalised:
        return Verdict(1.0, normalised)
    if _INTEGER.fullmatch(normalised) and _INTEGER.fullmatch(truth):
        return Verdict(float(int(normalised) == int(truth)), normalised)
    return Verdict(float(_sympy_equal(ground_truth, answer)), normalised)


def _sympy_equal(ground_truth: str, answer: str) -> bool:
    """Whether both parse to equal expressions. What cannot be parsed equals nothing; other errors are raised."""
    from math_verify import LatexExtractionConfig, parse, verify

    # Only the LaTeX reading, inside one box: the plain-expression reading would evaluate text that a model wrote.
    def read(source: str) -> list[Any]:
        boxed = rf"\boxed{{{source.replace('$', '')}}}"
        return parse(boxed, [LatexExtractionConfig()], parsing_timeout=None, raise_on_error=True)  # type: ignore[arg-type]

    # The library's own limits rest on signals; here the pool's deadline kills the whole process.
    return verify(read(ground_truth), read(answer), timeout_seconds=None, raise_on_error=True)


def reasoning_gym(text: str, ground_truth: str, extra: dict[str, Any]) -> Verdict:
    """The scorer of the problem's own reasoning-gym task.

    It gets the last <answer>…</answer>, or else the last "Answer: …" line, or else the whole response, since these
    scorers know what a partly right text is worth. `extra` holds the task's name, its options and the entry as a
    Python literal (data/reasoning_tasks.py).
    """
    answer = extraction.last_answer_tag(text)
    answer = extraction.last_answer_line(text) if answer is None else answer
    answer = text.strip() if answer is None else answer
    scorer = _scorer(extra["task"], repr(sorted(extra["options"].items())))
    return Verdict(float(scorer(answer, ast.literal_eval(extra["entry"]))), answer)


@cache
def _scorer(task: str, options: str) -> Callable[[str, dict[str, Any]], float]:
    """`score_answer` of a task with these options, which some tasks' scorers read."""
    import reasoning_gym as gym

    return gym.create_dataset(task, **dict(ast.literal_eval(options))).score_answer


RULES: dict[str, Rule] = {"exact_match": exact_match, "math_verify": math_verify, "reasoning_gym": reasoning_gym}
"""By their name in `reward.rule`."""


def prepare(rule: str) -> Rule:
    """The rule of that name with its libraries imported and warm, so that no response's deadline pays for that."""
    if rule == "math_verify":
        _sympy_equal(r"\frac{1}{2}", "0.5")
    if rule == "reasoning_gym":
        import reasoning_gym  # noqa: F401
    return RULES[rule]
