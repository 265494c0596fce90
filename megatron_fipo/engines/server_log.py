"""The log of a started vLLM server, and what of it belongs into an error message."""

import re
from pathlib import Path

TAIL_LINES = 15
NOISE = re.compile(r"nanobind: | - leaked | - \.\.\. skipped|Route: /")
"""Lines that vLLM's start and exit print by the hundred and that say nothing of a failure."""
ERROR = re.compile(r"\bERROR\b.*\] (\w[\w.]*(?:Error|Exception)\b.*)")


class ServerLog:
    """A log file that this server appends to; what was in it before is another server's."""

    def __init__(self, path: Path):
        self.path = path
        self._start = path.stat().st_size if path.exists() else 0

    def excerpt(self) -> str:
        """The first error, which the many after it follow from, and the last lines."""
        with self.path.open("rb") as file:
            file.seek(self._start)
            text = file.read().decode(errors="replace")
        lines = [line for line in text.splitlines() if line.strip() and not NOISE.search(line)]
        errors = [match[1] for line in lines if (match := ERROR.search(line))]
        first = f"its first error: {errors[0]}; " if errors else ""
        return f"{first}the end of {self.path}:\n" + "\n".join(lines[-TAIL_LINES:])
