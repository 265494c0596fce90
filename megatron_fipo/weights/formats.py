"""How weights lie in a directory: as a distributed checkpoint, or as Hugging Face has them. Imports no torch."""

from pathlib import Path

METADATA = ".metadata"
"""The file by which a distributed checkpoint is known."""


def is_checkpoint(directory: Path) -> bool:
    """Whether the weights in `directory` are a distributed checkpoint's, and not Hugging Face's."""
    return (directory / METADATA).is_file()
