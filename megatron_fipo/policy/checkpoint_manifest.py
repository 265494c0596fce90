"""What a checkpoint consists of: each file with its size and checksum, written last and held against it at a resume.

It finds damage, of disks and copies, not forgery: whoever can change a file can change its checksum too.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple
from pathlib import Path

import torch.distributed
import xxhash

from megatron_fipo.errors import CheckpointError
from megatron_fipo.files import write_json_atomically
from megatron_fipo.policy.checkpoint_files import Digest, digest_of
from megatron_fipo.policy.checkpoint_places import files_of
from megatron_fipo.policy.together import together

MANIFEST = "manifest.json"
_ALGORITHM = "xxh3_128"
_AS_OLD_AS_MANIFESTS = ("trainer.safetensors", "rollout")
"""What no checkpoint from before manifests has: the first, the format after them, or the second, today's."""


def write(directory: Path, known: Mapping[str, Digest]) -> None:
    """Write the manifest of everything in `directory`; files whose digest is not known are read for it.

    Raises:
        CheckpointError: a file is not as long as what was written to it.
        OSError: a file cannot be read, or the manifest not be written.
    """
    files = {}
    for name, size in sorted(files_of(directory).items()):
        files[name] = known.get(name) or digest_of(directory / name)
        if files[name].size != size:
            raise CheckpointError(f"{directory / name} has {size} bytes, and {files[name].size} were written")
    if lost := sorted(known.keys() - files.keys()):
        raise CheckpointError(f"{directory / lost[0]} was written and is not there")
    listed = {name: list(astuple(digest)) for name, digest in files.items()}
    content = {"algorithm": _ALGORITHM, "files": listed, "checksum": _checksum(listed)}
    write_json_atomically(directory / MANIFEST, content)


def verify(directory: Path) -> str:
    """Hold a checkpoint against its manifest; every rank calls this together and reads a share of the bytes.

    Returns:
        A warning about a checkpoint of a version that had no manifests, or nothing.

    Raises:
        CheckpointError: on every rank; a file is missing, is not the checkpoint's, or has other bytes. Names it.
    """
    return together(str(directory), lambda: _verify(directory, _share))


def verify_alone(directory: Path) -> str:
    """As `verify`, by this process alone and without a process group."""
    try:
        return _verify(directory, iter)
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read: {error}") from None


def _verify(directory: Path, read: Callable[[Mapping[str, Digest]], Iterator[str]]) -> str:
    """`read` names the files whose bytes this process checks."""
    present = files_of(directory)
    present.pop(MANIFEST, None)
    files = _read(directory)
    if files is None:
        if any((directory / name).exists() for name in _AS_OLD_AS_MANIFESTS):
            raise CheckpointError(f"{MANIFEST} is missing; checkpoint.verify=false resumes without it")
        return f"{directory} has no {MANIFEST}, as before checksums were kept: whether it is whole is not checked"
    for name in sorted(files.keys() | present.keys()):
        if name not in present:
            raise CheckpointError(f"{name} is missing")
        if name not in files:
            raise CheckpointError(f"{name} does not belong to it: {MANIFEST} does not name it")
        if present[name] != files[name].size:
            raise CheckpointError(f"{name} has {present[name]} bytes, and {files[name].size} were written")
    for name in read(files):
        if digest_of(directory / name).checksum != files[name].checksum:
            raise CheckpointError(f"{name} is damaged: its checksum is another one than when it was written")
    return ""


def _share(files: Mapping[str, Digest]) -> Iterator[str]:
    """The files that this rank reads: the largest first, each for the rank that has the least to read."""
    ranks, mine = torch.distributed.get_world_size(), torch.distributed.get_rank()
    loads = [0] * ranks
    for name in sorted(files, key=lambda name: (-files[name].size, name)):
        chosen = loads.index(min(loads))
        loads[chosen] += files[name].size
        if chosen == mine:
            yield name


def _read(directory: Path) -> dict[str, Digest] | None:
    """The manifest's files; None without one."""
    try:
        content = json.loads((directory / MANIFEST).read_text())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{MANIFEST} is damaged: {error}") from None
    try:
        if content["checksum"] != _checksum(content["files"]):
            raise CheckpointError(f"{MANIFEST} is damaged: its own checksum is another one than when it was written")
        if content["algorithm"] != _ALGORITHM:
            raise CheckpointError(f"{MANIFEST} has checksums of {content['algorithm']}; {_ALGORITHM} can be checked")
        return {name: Digest(int(size), str(checksum)) for name, (size, checksum) in content["files"].items()}
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{MANIFEST} is damaged: {type(error).__name__}: {error}") from None


def _checksum(files: object) -> str:
    return str(xxhash.xxh3_128(json.dumps(files, sort_keys=True).encode()).hexdigest())
