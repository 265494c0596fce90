"""Find the files that an entry of data.train or data.validation means: a file, a pattern or a directory."""

import glob
import os
import re
from difflib import get_close_matches
from pathlib import Path

from megatron_fipo.assets import resolve_embedded
from megatron_fipo.config.data import FILE_SUFFIXES

COMPRESSED = ".gz"
"""Ending that may follow .jsonl and .json."""

_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files that the datasets library writes beside the files of a data set."""
_SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")
_PATTERN = re.compile(r"[*?\[]")
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)?(:[\w.*/-]+)?\Z")


class NotFound(Exception):
    """Raised for an entry that names no file. The text says what is wrong, and `remedy` what would be right."""

    def __init__(self, problem: str, remedy: str):
        self.remedy = remedy
        super().__init__(problem)


def format_of(path: Path) -> str | None:
    """Return the ending in FILE_SUFFIXES that says how a file is read, compressed or not; None for other files."""
    ending = path.suffix
    if ending == COMPRESSED:
        ending = Path(path.stem).suffix
        return ending if ending in (".jsonl", ".json") else None
    return ending if ending in FILE_SUFFIXES else None


def source_name(path: Path) -> str:
    """Return a file's name without its endings and its shard number."""
    name = path.name.removesuffix(COMPRESSED)
    return _SHARD.sub("", name.removesuffix(Path(name).suffix))


def files_of(entry: str) -> list[Path]:
    """Return the files of an entry, sorted. Raises NotFound."""
    path = resolve_embedded(entry)
    # os.path.isfile returns False where Path.is_file raises: for names that are too long and for unreadable
    # directories.
    if os.path.isfile(path):
        if format_of(path) is None:
            raise NotFound(f"{entry} is of another format", _conversion(path))
        return [path]
    if os.path.isdir(path):
        return _in_directory(entry, path)
    if _PATTERN.search(entry):
        return _matching(entry, path)
    raise NotFound(_missing(entry, path), _instead(entry, path))


def _in_directory(entry: str, directory: Path) -> list[Path]:
    try:
        names = sorted(directory.iterdir())
    except OSError as error:
        raise NotFound(f"{entry} cannot be read: {error.strerror}", "a directory that can be read") from None
    found = [path for path in names if path.is_file() and _is_problem_file(path)]
    if not found:
        below = [f"{entry.rstrip('/')}/{path.name}" for path in names if path.is_dir() and _holds_problems(path)]
        remedy = f"one of {', '.join(below[:5])}" if below else f"one with files that end in {', '.join(FILE_SUFFIXES)}"
        raise NotFound(f"{entry} is a directory without a problem file", remedy)
    kinds = sorted({str(format_of(path)) for path in found})
    if len(kinds) > 1:
        patterns = " or ".join(f"'{entry.rstrip('/')}/*{kind}'" for kind in kinds)
        raise NotFound(f"{entry} has files that end in {' and in '.join(kinds)}", patterns)
    splits = sorted({name for path in found for name in _SPLITS if name in re.split(r"[^a-z]+", path.name.lower())})
    if len(splits) > 1:
        patterns = " or ".join(f"'{entry.rstrip('/')}/*{name}*'" for name in splits)
        raise NotFound(f"{entry} has files of the splits {' and '.join(splits)}", f"one split: {patterns}")
    return found


def _is_problem_file(path: Path) -> bool:
    return format_of(path) is not None and path.name not in _DESCRIPTIONS and path.name[0] not in "._"


def _holds_problems(directory: Path) -> bool:
    try:
        return any(_is_problem_file(path) for path in directory.iterdir())
    except OSError:
        return False


def _matching(entry: str, pattern: Path) -> list[Path]:
    try:
        found = sorted(Path(name) for name in glob.glob(str(pattern), recursive=True) if os.path.isfile(name))
    except ValueError:  # a name that is not possible in any file system
        found = []
    if not found:
        raise NotFound(f"{entry} matches no file", f"a pattern that matches some, seen from {os.getcwd()}")
    for path in found:
        if format_of(path) is None:
            raise NotFound(f"{entry} matches {path}, which is of another format", _conversion(path))
    return found


def _missing(entry: str, path: Path) -> str:
    shown = entry if len(entry) <= 200 else f"{entry[:200]}…"
    return f"{shown} is not a regular file" if os.path.lexists(path) else f"{shown} is not found"


def _instead(entry: str, path: Path) -> str:
    """Return what the user probably meant: a dataset of the hub, or a file with a similar name."""
    if _HUB_NAME.match(entry) and not os.path.isdir(path.parent) and format_of(path) is None:
        return f"a problem file; for the dataset of the hub: data.source=hub and {entry}"
    try:
        names = sorted(name.name for name in path.parent.iterdir() if _is_problem_file(name) and name.is_file())
    except (OSError, ValueError):
        names = []
    near = get_close_matches(path.name, names, n=1, cutoff=0.5) or names[:3]
    there = f"; {path.parent} has {' and '.join(near)}" if near else ""
    seen_from = "" if path.is_absolute() else f", seen from {os.getcwd()}"
    return f"a problem file{seen_from}{there}"


def _conversion(path: Path) -> str:
    """Return the command that converts a text table to a problem file."""
    separator = {".csv": "", ".tsv": ", sep='\\t'"}.get(path.suffix)
    if separator is None:
        return f"a file that ends in {', '.join(FILE_SUFFIXES)}, .jsonl.gz or .json.gz"
    target = path.with_suffix(".jsonl").name
    read = f"pandas.read_csv('{path}', dtype=str{separator})"
    return f"python -c \"import pandas; {read}.to_json('{target}', orient='records', lines=True)\" makes a .jsonl"
