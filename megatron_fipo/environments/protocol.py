"""What an environment is: it opens a sample, answers each action with more context or the end, and can be put aside.

One is made for each sample, by a function of the user's, and used by one process. Imports neither torch nor numpy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class Tokens(Protocol):
    """The model's tokenizer, as an environment needs it."""

    def encode_inside(self, text: str) -> list[int]:
        """Token ids of a text that goes on from other tokens: no bos token in front. Special tokens by their names."""

    def decode(self, ids: list[int]) -> str:
        """Text without special tokens."""


@dataclass(frozen=True)
class Task:
    """The problem that a sample is of."""

    id: str
    prompt: str
    """The prompt as the policy reads it, chat template applied."""
    ground_truth: str
    data_source: str
    columns: dict[str, Any]
    """All columns of the problem's row."""


@dataclass(frozen=True)
class Action:
    """What the policy produced in one turn."""

    token_ids: list[int]
    """Its end-of-sequence token included."""
    text: str
    """The same, decoded."""
    finish_reason: str
    """stop; length where rollout.max_response_length cut it off."""
    turns_left: int
    """How often the policy may speak after this."""
    tokens_left: int
    """Tokens of rollout.max_response_length that are left, for context and actions."""

    @property
    def is_last(self) -> bool:
        """Whether the sample ends here, whatever the environment answers."""
        return self.turns_left == 0 or self.tokens_left <= 1


@dataclass(frozen=True)
class More:
    """The sample goes on: these tokens are told to the policy, at least one. Not trained on."""

    token_ids: Sequence[int]


@dataclass(frozen=True)
class Done:
    """The sample ends."""

    reward: float | Mapping[str, Any] | None = None
    """As a reward function's value (docs/rewards.md): a number, or a dict of score, accuracy, answer and more. None:
    reward.rule judges the sample's text."""


class Environment(Protocol):
    """One sample's. `More` after an action that is the last ends the sample, which reward.rule then judges."""

    def reset(self, task: Task) -> Sequence[int]:
        """Begin. Token ids that the policy is told behind the problem's prompt; mostly none."""

    def step(self, action: Action) -> More | Done:
        """Answer what the policy has produced."""

    def state(self) -> dict[str, Any] | None:
        """What `restore` needs to go on from here, as JSON; None: it cannot, and a lost sample begins again."""

    def restore(self, task: Task, state: dict[str, Any]) -> None:
        """Go on, in a new object, where `state` was taken."""

    def close(self) -> None:
        """The sample has ended, or is given up."""
