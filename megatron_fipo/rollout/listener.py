"""Who hears how sampling goes: the run's console, or whatever passes it on to one."""

from contextlib import AbstractContextManager
from typing import Protocol


class Progress(Protocol):
    """Told how many of how many are done, and of what."""

    def __call__(self, done: int, total: int, unit: str, /) -> None: ...


class Stage(Protocol):
    """A part of a step that is under way."""

    def progress(self, done: int, total: int, unit: str = "") -> None:
        """It is so far."""


class Listener(Protocol):
    """Hears, and answers nothing."""

    def warn(self, text: str) -> None:
        """Something that whoever runs this should know."""

    def note(self, text: str) -> None:
        """Something that may interest them."""

    def phase(self, name: str) -> AbstractContextManager[Stage]:
        """A part of a step begins, and ends with the context."""
