"""Read the rotary embedding from config.json, in all forms in which transformers 4 and 5 write it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_fipo.models.keys import UNDERSTOOD
from megatron_fipo.models.kinds import number, same_value, shown


@dataclass(frozen=True)
class LinearScaling:
    """Every frequency is divided by the factor."""

    factor: float


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3's scaling: long wavelengths by the factor, short ones not at all, and those in between by a part."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


RopeScaling = LinearScaling | Llama3Scaling

KEYS_OF_TYPE: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""The supported rope types, with all keys of each."""

_PLACES = ("rope_parameters", "rope_scaling")
_THETA = "rope_theta"
_ORIGINAL = "original_max_position_embeddings"
_FACTOR = number(0, 1e15)


class RopeProblem(Exception):
    """A problem: the key, what is wrong with it, and what would be right."""

    def __init__(self, key: str, problem: str, remedy: str):
        super().__init__(key, problem, remedy)
        self.key, self.problem, self.remedy = key, problem, remedy


def read_rope(config: Mapping[str, Any], default_theta: float) -> tuple[float, RopeScaling | None]:
    """Return the base of the rotary frequencies, and how they are scaled.

    `config` is a whole config.json. transformers 5 writes everything into rope_parameters. transformers 4 writes the
    base as rope_theta, and the rest into rope_scaling. If there are both, programs differ in which one they read, so
    they must agree. Raises RopeProblem.
    """
    places = [place for place in _PLACES if config.get(place)] or [_PLACES[0]]
    described = [_read_place(place, config.get(place) or {}, config, default_theta) for place in places]
    if len(described) == 2:
        _must_agree(*described)
    rope = described[0]
    return float(rope[_THETA]), _scaling(places[0], rope)


def _read_place(
    place: str, given: Mapping[str, Any], config: Mapping[str, Any], default_theta: float
) -> dict[str, Any]:
    """Read one dictionary together with the keys beside it: the type as rope_type, then each key of that type."""
    rope = dict(given)
    kind = rope.pop("type", rope.get("rope_type", "default"))
    if rope.setdefault("rope_type", kind) != kind:
        problem = f"is {shown(kind)}, but rope_type is {shown(rope['rope_type'])}"
        raise RopeProblem(f"{place}.type", problem, "give one of them")
    if not isinstance(kind, str) or kind not in KEYS_OF_TYPE:
        problem = f"= {shown(kind)} cannot be computed exactly"
        raise RopeProblem(f"{place}.rope_type", problem, f"supported: {', '.join(KEYS_OF_TYPE)}")
    part = rope.pop("partial_rotary_factor", 1.0)
    if not same_value(part, 1.0):
        problem = f"= {shown(part)} is not supported"
        raise RopeProblem(f"{place}.partial_rotary_factor", problem, "1.0: all of a head is rotated")
    allowed = ("rope_type", _THETA, *KEYS_OF_TYPE[kind])
    for key, value in rope.items():
        if key not in allowed:
            raise RopeProblem(f"{place}.{key}", f"is not a key of rope_type {kind}", f"it has {', '.join(allowed)}")
        if key != "rope_type" and not (right := UNDERSTOOD.get(key, _FACTOR)).accepts(value):
            raise RopeProblem(f"{place}.{key}", f"= {shown(value)} is not supported", f"it must be {right.expected}")
    rope.setdefault(_THETA, config.get(_THETA, default_theta))
    for key in KEYS_OF_TYPE[kind]:
        if key not in rope:
            raise RopeProblem(f"{place}.{key}", f"is missing, and rope_type {kind} needs it", "add it")
    for key in (_THETA, _ORIGINAL):
        if key in config:
            _check_beside(place, rope, key, config[key])
    return rope


def _check_beside(place: str, rope: Mapping[str, Any], key: str, value: Any) -> None:
    """Check that a key beside the dictionary has the same value in it: programs differ in which one they read."""
    if key not in rope:
        raise RopeProblem(key, f"= {shown(value)}, but rope_type {rope['rope_type']} has no such key", "remove it")
    if not same_value(rope[key], value):
        raise RopeProblem(f"{place}.{key}", f"is {shown(rope[key])}, but {key} is {shown(value)}", "give one of them")


def _must_agree(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    for key in {**one, **other}:
        if key not in one or key not in other or not same_value(one[key], other[key]):
            first, second = (f"{place}.{key}" for place in _PLACES)
            problem = f"is {shown(other.get(key))}, but {first} is {shown(one.get(key))}"
            raise RopeProblem(second, problem, "give one of rope_parameters and rope_scaling, or the same in both")


def _scaling(place: str, rope: Mapping[str, Any]) -> RopeScaling | None:
    if rope["rope_type"] == "default":
        return None
    if rope["factor"] < 1:
        raise RopeProblem(f"{place}.factor", f"is {rope['factor']}", "1 or more")
    factor = float(rope["factor"])
    if rope["rope_type"] == "linear":
        return LinearScaling(factor)
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    if low >= high:
        raise RopeProblem(f"{place}.high_freq_factor", f"is {high:g}, low_freq_factor {low:g}", "the larger of the two")
    return Llama3Scaling(factor, low, high, rope[_ORIGINAL])
