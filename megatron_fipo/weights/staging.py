"""A directory that appears complete or not at all, and whose making can be taken up again after a kill.

Files are finished one by one beside the target; a journal says which ones are, and what they were made from.
"""

import contextlib
import fcntl
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from megatron_fipo.errors import WeightError
from megatron_fipo.files import sync

JOURNAL, LOCK = "journal.jsonl", "lock"


def check_space(target: Path, wanted: int) -> None:
    """WeightError if so many bytes cannot be written: better before hours of work than after."""
    place = target.resolve().parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < wanted:
        raise WeightError(f"{target} takes {wanted / 2**30:.2f} GiB, but {free / 2**30:.2f} GiB are free there")


class Staging:
    """What becomes `target` by one rename, in `commit`. A context manager.

    An error, or leaving without `commit`, removes what was written. A kill or Ctrl-C leaves it: the next process with
    an equal `recipe` finds the finished files in `finished`; one with another recipe, or with None, starts afresh.
    """

    def __init__(self, target: Path, recipe: dict[str, Any] | None = None):
        """`recipe` (JSON-ready) is all that decides the contents. WeightError if `target` exists and is not empty."""
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise WeightError(f"{target} exists and is not empty; choose a new directory")
        self.target = target
        self.directory = target.parent / f".{target.name}.partial"
        self.finished: dict[str, Any] = {}
        """What `finish` was given, by file name."""
        self._recipe = None if recipe is None else json.loads(json.dumps(recipe))
        self._lock: TextIO | None = None
        self._committed = False

    def __enter__(self) -> Self:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = (self.directory / LOCK).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise WeightError(f"another process is writing {self.target}, in {self.directory}") from None
        try:
            self._take_up()
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stopped = kind is not None and not issubclass(kind, Exception)
        if not self._committed and not (stopped and self._recipe is not None):
            shutil.rmtree(self.directory, ignore_errors=True)
        if self._lock is not None:
            self._lock.close()

    def unfinished(self, file_name: str) -> Path:
        """Where to write a file until `finish`."""
        return self.directory / f"{file_name}.unfinished"

    def finish(self, file_name: str, record: Any) -> None:
        """The file has all its content: put it durably under its name, and note `record` (JSON-ready) of it."""
        path = self.unfinished(file_name)
        path.chmod(0o644)
        sync(path)
        path.rename(self.directory / file_name)
        sync(self.directory)
        self._append({"file": file_name, "record": record})
        self.finished[file_name] = record

    def commit(self) -> None:
        """Put the directory in its place."""
        (self.directory / JOURNAL).unlink()
        (self.directory / LOCK).unlink()
        self.directory.chmod(0o755)
        sync(self.directory)
        self.directory.rename(self.target)
        self._committed = True
        sync(self.target.parent)

    def _take_up(self) -> None:
        """Removes what is not finished, and begins the journal anew."""
        self.finished = self._read_journal()
        for path in self.directory.iterdir():
            if path.name not in (LOCK, *self.finished):
                path.unlink()
        self._append({"recipe": self._recipe})
        for name, record in self.finished.items():
            self._append({"file": name, "record": record})

    def _read_journal(self) -> dict[str, Any]:
        if self._recipe is None:
            return {}
        lines = []
        with contextlib.suppress(OSError, ValueError):  # the last line may be cut short
            for line in (self.directory / JOURNAL).read_text().splitlines():
                lines.append(json.loads(line))
        if not lines or lines[0] != {"recipe": self._recipe}:
            return {}
        return {line["file"]: line["record"] for line in lines[1:]}

    def _append(self, line: dict[str, Any]) -> None:
        with (self.directory / JOURNAL).open("a") as journal:
            journal.write(json.dumps(line) + "\n")
            journal.flush()
            os.fsync(journal.fileno())
