"""What config.json says of a mixture of experts: the record, and the keys that it is read from. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_fipo.models.kinds import BOOLEAN, Kind, list_of, or_null, shown, whole


@dataclass(frozen=True)
class Experts:
    """The mixture of experts of a model."""

    number: int
    """Experts of a layer."""
    per_token: int
    """Experts that a token goes to: those with the largest scores."""
    ffn_hidden_size: int
    """Width of one expert."""
    normalized: bool
    """Whether the scores of a token's experts are scaled to a sum of 1."""
    layers: tuple[bool, ...]
    """For each layer, whether its feed-forward is a mixture of experts."""
    shared_ffn_hidden_size: int = 0
    """Width of the expert that every token goes to, by a gate of its own; 0: there is none."""

    @property
    def everywhere(self) -> bool:
        """Whether every layer has experts."""
        return all(self.layers)


@dataclass(frozen=True)
class ExpertKeys:
    """The keys of config.json that describe a family's experts."""

    number: tuple[str, ...]
    """The names of one key, of which a file has any."""
    ffn_hidden_size: str
    normalized: str | None = None
    """None: the scores are always normalized."""
    shared_ffn_hidden_size: str | None = None
    per_token: str = "num_experts_per_tok"


class ExpertsProblem(Exception):
    """A problem: the key, what is wrong with it, and what would be right."""

    def __init__(self, key: str, problem: str, remedy: str):
        super().__init__(key, problem, remedy)
        self.key, self.problem, self.remedy = key, problem, remedy


_DENSE_LAYERS, _STEP = "mlp_only_layers", "decoder_sparse_step"

NUMBER = whole(2, 2**15)
"""How many experts a layer may have: their numbers fit into 16 bits, in which choices are recorded."""

ROUTER_KEYS: Mapping[str, Kind] = {
    "num_experts_per_tok": whole(1, 2**16),
    # What transformers returns in addition, and adds to a loss of its own. A run has algorithm.router_aux_loss_coef.
    "output_router_logits": BOOLEAN,
    "router_aux_loss_coef": Kind(
        "a number with a decimal point", lambda value: type(value) is float and abs(value) < 1e15
    ),
}
"""Keys of every family with experts."""

LAYER_KEYS: Mapping[str, Kind] = {
    _STEP: whole(1, 1000),
    _DENSE_LAYERS: or_null(list_of(whole(0, 999))),
}
"""Keys that say which layers have experts."""


def read_experts(config: Mapping[str, Any], keys: ExpertKeys) -> Experts:
    """Return what a checked config.json, with its defaults, says of the experts. Raises ExpertsProblem."""
    number_key, number = _number(config, keys.number)
    per_token = config[keys.per_token]
    if per_token > number:
        raise ExpertsProblem(keys.per_token, f"= {per_token} is more than {number_key} = {number}", "at most as many")
    normalized = keys.normalized is None or config[keys.normalized]
    if per_token == 1 and normalized:
        problem = "= 1, and the only score is scaled to 1: the router would not learn"
        raise ExpertsProblem(keys.per_token, problem, "2 or more" if keys.normalized is None else _or_off(keys))
    dense, step = config.get(_DENSE_LAYERS) or [], config.get(_STEP, 1)
    layers = tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(config["num_hidden_layers"]))
    if not any(layers):
        key = _STEP if step > len(layers) else _DENSE_LAYERS
        raise ExpertsProblem(
            key,
            f"= {shown(config[key])} leaves none of num_hidden_layers = {len(layers)} with experts",
            "fewer dense ones",
        )
    return Experts(
        number=number,
        per_token=per_token,
        ffn_hidden_size=config[keys.ffn_hidden_size],
        normalized=normalized,
        layers=layers,
        shared_ffn_hidden_size=config[keys.shared_ffn_hidden_size] if keys.shared_ffn_hidden_size else 0,
    )


def _number(config: Mapping[str, Any], names: tuple[str, ...]) -> tuple[str, int]:
    """Return the name in the file, and the value. transformers 4 and 5 name the key differently."""
    found = [(name, config[name]) for name in names if name in config]
    for name, value in found[1:]:
        if value != found[0][1]:
            raise ExpertsProblem(name, f"is {value}, but {found[0][0]} is {found[0][1]}", "give one of them")
    if not found:
        raise ExpertsProblem(names[0], "is missing", "the number of experts")
    return found[0]


def _or_off(keys: ExpertKeys) -> str:
    return f"2 or more, or {keys.normalized} = false"
