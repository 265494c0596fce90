"""Hugging Face datasets: find the files of a split, which the datasets library knows from the card and the file names.

owner/name                  the split train; for validation the split validation or test; or the only split
owner/name:split            that split
owner/name/config:split     that split of one configuration of the dataset
owner/name:PATTERN          the files that match a glob pattern (it has a dot, a slash or a *)
/some/directory:split       a directory with the layout of a dataset, such as a downloaded dataset
"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from megatron_fipo.config.data import FILE_SUFFIXES
from megatron_fipo.config.data_files import COMPRESSED, format_of
from megatron_fipo.config.hub import reason
from megatron_fipo.errors import DataError, one_line

_CARD_FILES = ("README.md", ".huggingface.yaml")
_USUAL_SPLITS = {"train": ("train",), "validation": ("validation", "test")}


@dataclass(frozen=True)
class HubFiles:
    """The files of one entry of data.train or data.validation."""

    paths: list[str]
    data_source: str
    """The data set's name for rows that do not have one."""


def fetch_split(entry: str, split: str) -> HubFiles:
    """Download a dataset into the hub's cache, and find the files of its part for `split`, train or validation.

    If the hub cannot be reached, the cache is used.

    Raises:
        DataError: neither hub nor cache has the dataset, or it has no such configuration, split or file.
    """
    if os.path.isfile(os.path.expanduser(entry)):
        raise DataError(f"{entry}: is a file, and not a dataset; data.source=files reads it")
    name, _, part = entry.partition(":")
    pattern = part if set(part) & set("*?[/.") else ""
    folder, config, data_source = _local_folder(name) or _download(name, pattern)
    if pattern:
        if pattern.startswith("/") or ".." in pattern.split("/"):
            raise DataError(f"{entry}: the pattern leads out of the dataset; one such as data/*.parquet does not")
        try:
            found = sorted(str(path) for path in folder.rglob(pattern) if format_of(path))
        except (ValueError, OSError) as error:
            raise DataError(f"{entry}: is not a pattern of files that can be read ({one_line(error)})") from error
        if not found:
            raise DataError(f"{entry}: the dataset has no file of that name that ends in {', '.join(FILE_SUFFIXES)}")
        return HubFiles(found, data_source)
    splits = _splits(entry, folder, config)
    wanted = (part,) if part else _USUAL_SPLITS[split]
    chosen = next((name for name in wanted if name in splits), None)
    if chosen is None and not part and len(splits) == 1:
        chosen = next(iter(splits))
    if chosen is None:
        raise DataError(f"{entry}: has no split {' or '.join(wanted)}; its splits are {', '.join(splits)}: NAME:SPLIT")
    return HubFiles(splits[chosen], data_source)


def _local_folder(name: str) -> tuple[Path, str | None, str] | None:
    """(directory, configuration, name) where `name` is a directory here, or a configuration below one."""
    path = Path(os.path.expanduser(name))
    # os.path.isdir returns False where Path.is_dir raises, for example for names that are too long.
    if name and os.path.isdir(path):
        return path, None, path.resolve().name
    if os.path.isdir(path.parent) and len(path.parts) > 1:
        return path.parent, path.name, path.parent.resolve().name
    return None


def _download(name: str, pattern: str) -> tuple[Path, str | None, str]:
    """(directory, configuration, name) of a dataset of the hub."""
    from huggingface_hub import snapshot_download

    parts = name.split("/")
    if not all(parts) or len(parts) > 3:
        raise DataError(f"{name}: is not a dataset; owner/name or owner/name/config is one, a split follows a colon")
    files = [pattern] if pattern else [f"*{suffix}{end}" for suffix in FILE_SUFFIXES for end in ("", COMPRESSED)]
    try:
        folder = snapshot_download("/".join(parts[:2]), repo_type="dataset", allow_patterns=[*files, *_CARD_FILES])
    except Exception as error:  # the client raises exceptions of several libraries
        owner_and_name, folder_name = "/".join(parts[:2]), parts[min(len(parts), 2) - 1]
        raise DataError(
            f"{name}: is neither a directory here nor in the hub's cache, and {reason(error, 'dataset')}; "
            f"`hf download {owner_and_name} --repo-type dataset --local-dir {folder_name}` fetches it where there is "
            f"a network, and {'/'.join([folder_name, *parts[2:]])} is its name then"
        ) from error
    return Path(folder), parts[2] if len(parts) == 3 else None, parts[-1] if len(parts) < 3 else parts[1]


def _splits(entry: str, folder: Path, config: str | None) -> dict[str, list[str]]:
    """The files of each split of a dataset's configuration."""
    from datasets import load_dataset_builder

    with tempfile.TemporaryDirectory() as cache:
        try:
            builder = load_dataset_builder(str(folder), config, cache_dir=cache)
        except Exception as error:  # a dataset's card can make the library raise anything
            raise DataError(f"{entry}: {one_line(error)}") from error
    return {str(split): sorted(map(str, files)) for split, files in (builder.config.data_files or {}).items()}
