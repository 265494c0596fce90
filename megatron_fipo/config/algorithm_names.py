"""What `algorithm.name` may say. It is a label: the group's choice, algorithm=NAME, is what chooses an algorithm."""

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
    """Refuse a shipped algorithm's name on another loss, and warn of a name that is no algorithm's."""
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
            f"says {name}, whose loss_mode is {SHIPPED[name]}, but loss_mode is {mode}: the name is a label, and "
            "chooses nothing",
            f"algorithm={name} without .name chooses it; algorithm.name=NAME of your own labels another",
        )
