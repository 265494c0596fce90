"""A reward of the user's own: loaded by its name, called with what it asks for, and held to what a reward can be.

Runs in the verifier's processes. The function names what it wants; docs/rewards.md has the names.
"""

import inspect
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from megatron_fipo.errors import ConfigError, one_line
from megatron_fipo.plugins import load_function
from megatron_fipo.rewards.rules import LARGEST_REWARD, Verdict

KEY = "reward.rule"
Item = dict[str, Any]
"""What the pool sends of a response: values by the names of `OwnRule.inputs`; of the columns, their JSON text."""

PARAMETERS = {
    "response": "response",
    "token_ids": "token_ids",
    "ground_truth": "ground_truth",
    "columns": "columns",
    "data_source": "data_source",
    "prompt": "prompt",
    "finish_reason": "finish_reason",
    # As verl calls them.
    "solution_str": "response",
    "extra_info": "columns",
}
"""What a function may ask for, and the item's value that it is made of."""

_SCORE = ("score", "reward")
_ACCURACY = ("accuracy", "acc")
_ANSWER = ("answer", "pred")
_LONGEST_TEXT = 1000


class BadReward(Exception):
    """What the function returned is no reward. Names the value."""


@dataclass(frozen=True)
class OwnRule:
    """A function of the user's and the parameters that it is called with."""

    function: Callable[..., Any]
    parameters: tuple[str, ...]

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the values that an item must have."""
        return tuple(sorted({PARAMETERS[name] for name in self.parameters}))

    def __call__(self, item: Item) -> Verdict:
        """The verdict on one response. Raises whatever the function raises, and BadReward."""
        return verdict_of(self.function(**{name: _argument(name, item) for name in self.parameters}))


def load(place: str, function: str) -> OwnRule:
    """The function of that name in a module, or in a file that ends in .py.

    Raises:
        ConfigError: it cannot be imported, is no function, or asks for what there is not.
    """
    where = f"{place}:{function}"
    found = load_function(where, KEY)
    if inspect.iscoroutinefunction(found) or inspect.isgeneratorfunction(found):
        raise ConfigError(KEY, f"{where} is async or a generator", "a plain function that returns the reward")
    return OwnRule(found, _parameters(where, found))


def verdict_of(value: Any) -> Verdict:
    """What a function returned, as a verdict: a number, or a dict or object with `score` and perhaps more.

    Raises BadReward for anything else, and for numbers that are not finite or too large to train on.
    """
    if isinstance(value, Mapping):
        return _verdict(dict(value))
    if hasattr(value, "score") and not isinstance(value, type):
        named: Iterable[str] = getattr(value, "_fields", None) or getattr(value, "__slots__", None) or vars(value)
        return _verdict({name: getattr(value, name) for name in named if not name.startswith("_")})
    score = _number("returned", value)
    return Verdict(score, "", reward=score)


def _verdict(values: dict[Any, Any]) -> Verdict:
    score_name = next((name for name in _SCORE if name in values), None)
    if score_name is None:
        raise BadReward(f"returned an object with {sorted(map(str, values))[:20]} and no score")
    score = _number(score_name, values.pop(score_name))
    accuracy_name = next((name for name in _ACCURACY if values.get(name) is not None), None)
    accuracy = score if accuracy_name is None else _number(accuracy_name, values.pop(accuracy_name))
    answer_name = next((name for name in _ANSWER if values.get(name) is not None), None)
    answer = "" if answer_name is None else str(values.pop(answer_name))[:_LONGEST_TEXT]
    extra = {
        str(name): value[:_LONGEST_TEXT] if isinstance(value, str) else _number(f"returned {name} =", value)
        for name, value in values.items()
        if value is not None
    }
    return Verdict(accuracy, answer, reward=score, extra=extra)


def _number(name: str, value: Any) -> float:
    """A number, or numpy's or torch's of no dimension, as a float."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, Real):
        raise BadReward(f"{name} {_shown(value)}; a number is right, alone or as score of a dict")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or abs(number) > LARGEST_REWARD:
        raise BadReward(f"{name} {_shown(value)}; a finite number within ±{LARGEST_REWARD:g} is right")
    return number


def _shown(value: Any) -> str:
    try:
        text = " ".join(repr(value).split())
    except Exception as error:  # the user's own __repr__, or a whole number of too many digits
        text = f"what cannot be shown ({type(error).__name__})"
    return f"{text if len(text) <= 100 else text[:100] + '…'} ({type(value).__name__})"


def _argument(name: str, item: Item) -> Any:
    value = item[PARAMETERS[name]]
    if name == "columns":
        return json.loads(value)
    if name == "extra_info":
        return json.loads(value).get("extra_info") or {}
    return value


def _parameters(where: str, function: Callable[..., Any]) -> tuple[str, ...]:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as error:
        problem = f"the parameters of {where} cannot be read ({one_line(error)})"
        raise ConfigError(KEY, problem, "a function of your own around it") from error
    names = []
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            return tuple(name for name in PARAMETERS if name not in ("solution_str", "extra_info") or name in names)
        if name in PARAMETERS and parameter.kind is not parameter.POSITIONAL_ONLY:
            names.append(name)
        elif parameter.default is parameter.empty and parameter.kind is not parameter.VAR_POSITIONAL:
            known = f"a parameter is one of {', '.join(PARAMETERS)}, or has a default; docs/rewards.md has an example"
            raise ConfigError(KEY, f"{where} asks for {name}", known)
    return tuple(names)
