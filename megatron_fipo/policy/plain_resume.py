"""A resume that runs nothing a checkpoint says: tensors, plain data and a few records are read, or it is refused.

Megatron-Core reads checkpoints with torch's, which unpickle in three places without asking: the metadata, what lies
beside tensors as bytes, and, under one environment variable, common.pt. Transformer Engine then unpickles the FP8
state that it finds in a tensor of bytes. Here is what closes all four, for any version of either.
"""

import contextlib
import io
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from megatron_fipo.weights import plain_pickle
from megatron_fipo.weights.checkpoint_metadata import read_metadata
from megatron_fipo.weights.formats import METADATA


@contextlib.contextmanager
def plain_data_only() -> Iterator[None]:
    """Within it, whatever reads a distributed checkpoint in this process reads plain data only.

    pickle.UnpicklingError for the rest, perhaps within torch's CheckpointException. For the whole process, so for a
    time when nothing else is loaded: other readers are not harmed, but refuse what they would take.
    """
    torch_load, torch_metadata = torch.load, FileSystemReader.read_metadata
    known = torch.serialization.get_safe_globals()

    def load_plain(*args: Any, **kwargs: Any) -> Any:
        try:
            # Said explicitly, which no environment variable overrides.
            return torch_load(*args, **kwargs | {"weights_only": True})
        except pickle.UnpicklingError as error:
            raise pickle.UnpicklingError(_in_one_line(str(error))) from error

    def read_plain_metadata(self: FileSystemReader, *_: Any, **__: Any) -> Metadata:
        try:
            metadata = read_metadata(Path(self.path))
        except pickle.UnpicklingError as error:
            raise pickle.UnpicklingError(f"{METADATA} {error}") from error
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata

    torch.load, FileSystemReader.read_metadata = load_plain, read_plain_metadata  # type: ignore[assignment, method-assign]
    torch.serialization.clear_safe_globals()  # Megatron-Core's list has classes that no checkpoint of ours needs
    try:
        yield
    finally:
        torch.load, FileSystemReader.read_metadata = torch_load, torch_metadata  # type: ignore[method-assign]
        torch.serialization.add_safe_globals(known)


def _in_one_line(said: str) -> str:
    """What torch says of a pickle that it does not take, without its advice to take it all the same."""
    if named := re.search(r"GLOBAL (\S+)", said):
        return f"a pickle names {named[1]}, which no checkpoint needs"
    return "a pickle is damaged, or holds more than tensors and plain data"


def plain_extra_state(state: Any) -> Any:
    """A layer's extra state as it can be given to the layer: pickled anew if it is a pickle in a tensor of bytes.

    Transformer Engine unpickles such a tensor; what it then gets is of this process's own making. Raises
    pickle.UnpicklingError where the pickle is more than FP8 recipes, tensors and plain data.
    """
    if not isinstance(state, torch.Tensor) or not state.numel():
        return state
    if state.dtype != torch.uint8:
        raise pickle.UnpicklingError(f"extra state is of {state.dtype}, not of bytes")
    file = io.BytesIO(state.cpu().numpy().tobytes())
    found = plain_pickle.read(file, dict, _is_in_extra_state, dict.fromkeys(_STORAGE_READERS, _plain_storage))
    return torch.frombuffer(bytearray(pickle.dumps(found)), dtype=torch.uint8)


def _plain_storage(content: Any) -> Any:
    """What torch unpickles a tensor's storage by, but for the code that a pickle in the storage could run."""
    if not isinstance(content, bytes):
        raise pickle.UnpicklingError("a tensor's storage is not of bytes")
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


# Megatron-Core 0.19 puts its own in place of torch's.
_STORAGE_READERS = (("torch.storage", "_load_from_bytes"), ("megatron.core.safe_globals", "safe_load_from_bytes"))


def _is_in_extra_state(module: str, name: str) -> bool:
    """Whether a layer's FP8 state names it."""
    return name in _EXTRA_STATE_NAMES.get(module, ()) or (
        module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
    )


_EXTRA_STATE_NAMES = {
    "collections": {"OrderedDict"},
    "torch": {"Size"},
    "torch._utils": {"_rebuild_tensor_v2"},
    "transformer_engine.common.recipe": {
        "DelayedScaling",
        "Float8BlockScaling",
        "Float8CurrentScaling",
        "Format",
        "MMParams",
        "MXFP8BlockScaling",
        "NVFP4BlockScaling",
        "QParams",
        "_FormatHelper",
    },
    "megatron.core.extensions.transformer_engine": {"TEDelayedScaling"},
}
