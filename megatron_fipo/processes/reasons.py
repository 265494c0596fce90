"""Report why a process of a run has ended, over a pipe, to the process that started it. That one prints it once.

A rank reports to its launcher, and a launcher to the library's caller. Without such a pipe a process prints the reason
itself.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_fipo.errors import FipoError

_VARIABLE = "FIPO_REASON_FD"
_told_to = os.environ.pop(_VARIABLE, None)  # so that child processes do not use the same descriptor
if _told_to is not None:
    os.set_inheritable(int(_told_to), False)

_LONGEST = 7000
"""Maximum length of a reason. Twice this fits into a pipe, which nobody reads while the process runs."""


@dataclass(frozen=True)
class Reason:
    """The error of a process, in one line, and its exit status."""

    text: str
    exit_code: int


def tell(error: FipoError) -> bool:
    """Report the error to the process that started this one. Return False if that one does not listen."""
    if _told_to is None:
        return False
    text = str(error) if len(str(error)) <= _LONGEST else f"{str(error)[:_LONGEST]} …"
    message = json.dumps([text, error.exit_code], ensure_ascii=False)
    try:
        os.write(int(_told_to), f"{message}\n".encode())
    except OSError:  # the listening process has ended
        return False
    return True


@contextlib.contextmanager
def told_at_once() -> Iterator[None]:
    """If the block fails, report the error at once, before this process leaves groups and others fail because of it."""
    try:
        yield
    except FipoError as error:
        tell(error)
        raise


class Listener:
    """The end of a pipe on which one process's reason arrives. It is a context manager, which closes it."""

    def __init__(self) -> None:
        self._read, self.descriptor = os.pipe()
        os.set_blocking(self._read, False)
        self._text = b""

    def __enter__(self) -> "Listener":
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._read)
        os.close(self.descriptor)

    def environment(self) -> dict[str, str]:
        """Return the variables that the process needs, besides the descriptor itself, to report its reason here."""
        return {_VARIABLE: str(self.descriptor)}

    def heard(self) -> Reason | None:
        """Return the reason, or None if none has arrived."""
        with contextlib.suppress(BlockingIOError):
            while arrived := os.read(self._read, 65536):
                self._text += arrived
        first, ended, _ = self._text.partition(b"\n")  # a killed process may have written only half of it
        return Reason(*json.loads(first)) if ended else None
