"""How a response is judged: one function a rule, from texts to an accuracy. Runs in the verifier's processes.

A rule returns a verdict or raises; it never turns its own failure into "wrong". The heavy libraries are imported where
they are used, so that a worker of the exact-match rule stays small and starts at once. Neither torch nor numpy here.
"""

import ast
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

from megatron_fipo.rewards import extraction

LARGEST_REWARD = 1e6
"""Most that a reward of the user's own may be, above or below 0: far below what overflows in training."""

# The recipe looks for the answer only at the end: an early "Answer:" in a long response is not its conclusion.
_TAIL_CHARACTERS = 300
_NO_ANSWER = "[INVALID]"


@dataclass(frozen=True)
class Verdict:
    """What a rule found."""

    accuracy: float
    """From 0, wrong, to 1, right."""
    answer: str
    """The extracted answer in its normal form, for consensus voting; empty where there is none."""
    outcome: str = "judged"
    """judged, or too_long for an answer above the rule's limit, which is wrong."""
    reward: float | None = None
    """The reward as it is, of a rule of the user's own; None: reward.correct and reward.incorrect make it."""
    extra: dict[str, float | str] = field(default_factory=dict)
    """What else a rule of the user's own said."""


RewardFunction = Callable[[str, str, dict[str, Any]], Verdict]
"""(response text, ground truth, the problem's `extra`) → verdict."""


def exact_match(text: str, ground_truth: str, extra: dict[str, Any]) -> Verdict:
    """The published rule: the last "Answer: …" of the last 300 characters, compared as a normalised string.

    Equal to verl's `math_dapo` on every pair of texts. Like there, a response without an "Answer:" is compared as
    "[INVALID]"; but it has no vote in a consensus.
    """
    found = extraction.published_answer(text[-_TAIL_CHARACTERS:])
    normalised = extraction.normalise_answer(_NO_ANSWER if found is None else found)
    accuracy = float(normalised == extraction.normalise_answer(ground_truth))
    return Verdict(accuracy, "" if found is None else normalised)


def math_verify(text: str, ground_truth: str, extra: dict[str, Any], tolerance: float = 0.0) -> Verdict:
    r"""Mathematical equality of the last "Answer: …", <answer> tag or \boxed{…} with the ground truth.

    "Right" is proved by exact arithmetic and sympy; what cannot be read or proved is right only where the two are the
    same text. An answer of more than LONGEST_ANSWER characters is wrong unread. docs/rewards.md says what counts as
    dress. `tolerance`: relative, for numbers of which one is a decimal.
    """
    from megatron_fipo.rewards import mathematics

    answer = mathematics.find_answer(text)
    if answer is None:
        return Verdict(0.0, "")
    if len(answer) > mathematics.LONGEST_ANSWER:
        return Verdict(0.0, "", "too_long")
    is_right, normal_form = mathematics.judge(answer, ground_truth, tolerance)
    return Verdict(float(is_right), normal_form)


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


RULES: dict[str, RewardFunction] = {
    "exact_match": exact_match,
    "math_verify": math_verify,
    "reasoning_gym": reasoning_gym,
}
"""By their name in `reward.rule`."""


INPUTS = ("extra", "ground_truth", "response")
"""What these rules are told of a response."""


def prepare(rule: str, math_tolerance: float) -> RewardFunction:
    """The rule of that name with its libraries imported and warm, so that no response's deadline pays for that."""
    if rule == "math_verify":
        # One answer by each way: read, refuted, proved.
        for answer in ("7", r"\sin^2 x + \cos^2 x", r"\sqrt{3 + 2\sqrt{2}}"):
            math_verify(f"Answer: {answer}", r"1 + \sqrt{2}", {})
            math_verify(f"Answer: {answer}", "1", {})
        return partial(math_verify, tolerance=math_tolerance)
    if rule == "reasoning_gym":
        import reasoning_gym  # noqa: F401
    return RULES[rule]
