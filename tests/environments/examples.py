"""Environments for tests, by token ids alone, so that a model needs no tokenizer for them."""

import os
import time
from typing import Any

from megatron_fipo.environments.protocol import Done, More


class Told:
    """Answers each action with the options' tokens, until the last turn; the reward counts the actions' tokens."""

    def __init__(self, tokens: Any, told: list[list[int]], opening: tuple[int, ...] = (), keeps_state: bool = True):
        self.told, self.opening, self.keeps_state = told, opening, keeps_state
        self.lengths: list[int] = []
        self.task: Any = None

    def reset(self, task: Any) -> Any:
        self.task = task
        return self.opening

    def step(self, action: Any) -> Any:
        self.lengths.append(len(action.token_ids))
        if len(self.lengths) > len(self.told):
            return Done({"score": sum(self.lengths), "accuracy": 0.25, "turns": len(self.lengths), "id": self.task.id})
        return More(self.told[len(self.lengths) - 1])

    def state(self) -> Any:
        return {"lengths": self.lengths} if self.keeps_state else None

    def restore(self, task: Any, state: dict[str, Any]) -> None:
        self.task, self.lengths = task, state["lengths"]

    def close(self) -> None:
        """Nothing to close."""


class Broken(Told):
    """Fails in `step`, or in `reset`, in the way of the options, for the problems whose id ends with `of`."""

    def __init__(self, tokens: Any, way: str, of: str = "", in_reset: bool = False, until: str = "", **options: Any):
        super().__init__(tokens, [[5]], **options)
        self.way, self.of, self.in_reset, self.until = way, of, in_reset, until

    def reset(self, task: Any) -> Any:
        super().reset(task)
        return self._fail() if self.in_reset and self._is_due() else ()

    def step(self, action: Any) -> Any:
        return self._fail() if not self.in_reset and self._is_due() else super().step(action)

    def _is_due(self) -> bool:
        if not self.task.id.endswith(self.of):
            return False
        if self.until:  # a file, which the first failure makes
            if os.path.exists(self.until):
                return False
            open(self.until, "w").close()
        return True

    def _fail(self) -> Any:
        if self.way == "hang":
            time.sleep(600)
        if self.way == "exit":
            os._exit(3)
        if self.way == "raise":
            raise ValueError("no such tool")
        return {
            "no answer": None,
            "no token": More([]),
            "unknown token": More([5, 99]),
            "no reward": Done("good"),
        }[self.way]


def no_environment(tokens: Any) -> Any:
    """Lacks everything."""
    return object()


def knows_variable(tokens: Any) -> Any:
    """What it tells is the length of a variable's value."""
    return Told(tokens, [[len(os.environ["SERVICE_KEY"])]])
