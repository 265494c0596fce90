"""Files that ship with the package: the embedded model and its problems, named embedded:NAME in configurations."""

import os
from pathlib import Path

_PREFIX = "embedded:"


def resolve_embedded(path: str) -> Path:
    """The file or directory that a configured path means: embedded:NAME lies in this package, ~ is the user's home."""
    if path.startswith(_PREFIX):
        return Path(__file__).parent / path.removeprefix(_PREFIX)
    # Path.expanduser raises where there is no such user.
    return Path(os.path.expanduser(path))
