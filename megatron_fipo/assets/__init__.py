"""Files that ship with the package: the embedded model and its problems, named embedded:NAME in configurations."""

from pathlib import Path

_PREFIX = "embedded:"


def resolve_embedded(path: str) -> Path:
    """The file or directory that a configured path means: embedded:NAME lies in this package, others are as given."""
    if path.startswith(_PREFIX):
        return Path(__file__).parent / path.removeprefix(_PREFIX)
    return Path(path)
