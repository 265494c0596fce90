"""The environment of samples of one turn: the first action is the end, and reward.rule judges it.

Runs with environment.name=single_turn sample groups whole and start no process for it; by its function's name it goes
the way of all environments, to the same samples.
"""

from collections.abc import Sequence
from typing import Any

from megatron_fipo.environments.protocol import Action, Done, Environment, More, Task, Tokens


class SingleTurn:
    """Says nothing."""

    def reset(self, task: Task) -> Sequence[int]:
        """Nothing beside the prompt."""
        return ()

    def step(self, action: Action) -> More | Done:
        """The end."""
        return Done()

    def state(self) -> dict[str, Any] | None:
        """There is none to lose."""
        return {}

    def restore(self, task: Task, state: dict[str, Any]) -> None:
        """Nothing to restore."""

    def close(self) -> None:
        """Nothing to close."""


def make(tokens: Tokens) -> Environment:
    """What `environment.name` names."""
    return SingleTurn()
