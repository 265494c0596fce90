"""Why a process of a run has ended, told over a pipe to the process that started it, which says it once.

A rank tells its launcher, and a launcher the library's caller. Without such a pipe a process says it itself.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_fipo.errors import FipoError

_VARIABLE = "FIPO_REASON_FD"
_told_to = os.environ.pop(_VARIABLE, None)  # so that what this process starts does not take the number for its own
if _told_to is not None:
    os.set_inheritable(int(_told_to), False)

_LONGEST = 7000
"""Characters of a reason: told twice it fits into a pipe, which nobody empties while the process runs."""


@dataclass(frozen=True)
class Reason:
    """What a process refused or failed at, in one line, and its exit status."""

    text: str
    exit_code: int


def tell(error: FipoError) -> bool:
    """Tell whoever started this process; False where nobody has asked for it."""
    if _told_to is None:
        return False
    text = str(error) if len(str(error)) <= _LONGEST else f"{str(error)[:_LONGEST]} …"
    message = json.dumps([text, error.exit_code], ensure_ascii=False)
    try:
        os.write(int(_told_to), f"{message}\n".encode())
    except OSError:  # whoever asked is gone
        return False
    return True


@contextlib.contextmanager
def told_at_once() -> Iterator[None]:
    """Tell of what fails in here before this process takes leave of others, which may fail because of that."""
    try:
        yield
    except FipoError as error:
        tell(error)
        raise


class Listener:
    """The end of a pipe at which one process's reason arrives; a context manager, which closes it."""

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
        """What the process has to have, beside the descriptor itself, to tell its reason here."""
        return {_VARIABLE: str(self.descriptor)}

    def heard(self) -> Reason | None:
        """The reason, once it has arrived."""
        with contextlib.suppress(BlockingIOError):
            while arrived := os.read(self._read, 65536):
                self._text += arrived
        first, ended, _ = self._text.partition(b"\n")  # a killed process may have written half of it
        return Reason(*json.loads(first)) if ended else None
