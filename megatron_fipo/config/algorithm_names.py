"""Checks of `algorithm.name`. It is only a label: the group's choice, algorithm=NAME, chooses the algorithm."""

from collections.abc import Iterator
from difflib import get_close_matches

from megatron_fipo.config.algorithm import AlgorithmConfig
from megatron_fipo.errors import ConfigError

SHIPPED = {
    "fipo": "future_kl",
    "fipo_7b": "future_kl",
    "dapo": "vanilla",
    "grpo": "vanilla",
    "dr_grpo": "vanilla",
    "gspo": "gspo",
    "cispo": "cispo",
    "sapo": "sapo",
}
"""The choices of the group algorithm, each with its loss_mode."""


def label(algorithm: AlgorithmConfig) -> Iterator[str]:
    """Refuse the name of a shipped algorithm on another loss, and warn about a name that no algorithm has."""
    name, mode = algorithm.name, algorithm.loss_mode
    if algorithm.loss is not None:
        return
    if name not in SHIPPED:
        near = get_close_matches(name, SHIPPED, n=1)
        meant = f"; did you mean algorithm={near[0]}?" if near else f"; algorithm={'|'.join(SHIPPED)} chooses one"
        yield f"algorithm.name: {name} is a label alone, and the loss is loss_mode={mode}{meant}"
    elif SHIPPED[name] != mode:
        raise ConfigError(
            "algorithm.name",
            f"says {name}, whose loss_mode is {SHIPPED[name]}, but loss_mode is {mode}: the name is only a label, and "
            "does not choose the algorithm",
            f"algorithm={name}, without .name, to choose it; or another label: algorithm.name=NAME",
        )
