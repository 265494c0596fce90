"""Files that are shipped with the package: the embedded model and its problems, embedded:NAME in configurations."""

import os
from pathlib import Path

_PREFIX = "embedded:"


def resolve_embedded(path: str) -> Path:
    """Return the file or directory of a configured path. embedded:NAME is in this package, and ~ is the user's home."""
    if path.startswith(_PREFIX):
        return Path(__file__).parent / path.removeprefix(_PREFIX)
    # Path.expanduser raises an error if there is no such user.
    return Path(os.path.expanduser(path))
