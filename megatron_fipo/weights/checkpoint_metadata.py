"""The metadata of a distributed checkpoint, read without running what its pickle says.

It tells in which file each chunk of each tensor lies. Whoever reads a checkpoint, a resumed run or the converter, reads
it here.
"""

import pickle
from pathlib import Path, PurePath

import torch
from torch.distributed.checkpoint.metadata import Metadata

from megatron_fipo.weights import plain_pickle
from megatron_fipo.weights.formats import METADATA


def read_metadata(directory: Path) -> Metadata:
    """The metadata of the checkpoint in `directory`.

    Raises:
        pickle.UnpicklingError: it is damaged, names what no metadata needs, or a file that is not in `directory`.
        OSError: it cannot be read.
    """
    with (directory / METADATA).open("rb") as file:
        metadata = plain_pickle.read(file, Metadata, _is_in_metadata)
    places = metadata.storage_data
    if not isinstance(places, dict) or not isinstance(metadata.state_dict_metadata, dict):
        raise pickle.UnpicklingError("is damaged: it does not say what lies where")
    for place in places.values():
        name = getattr(place, "relative_path", None)
        if not isinstance(name, str) or PurePath(name).name != name:
            raise pickle.UnpicklingError(f"names a file outside its directory: {name!r}")
    return metadata


def _is_in_metadata(module: str, name: str) -> bool:
    """Whether torch's checkpoint metadata names it."""
    return name in _METADATA_NAMES.get(module, ()) or (module == "torch" and _is_dtype(name))


def _is_dtype(name: str) -> bool:
    return isinstance(getattr(torch, name, None), torch.dtype)


# By name: even among torch's own types there are some that open a file for writing when they are called.
_METADATA_NAMES = {
    "collections": {"OrderedDict"},
    "io": {"BytesIO"},
    "pathlib": {"Path", "PosixPath"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
}
