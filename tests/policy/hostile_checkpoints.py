"""What the rank of test_plain_resume.py runs: checkpoints with a pickle that runs code, each in another place."""

import contextlib
import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_fipo.config import Config
from megatron_fipo.errors import FipoError
from megatron_fipo.policy import checkpoint, model, platform
from megatron_fipo.weights.checkpoint_metadata import METADATA, read_metadata
from tests.policy import checkpoints
from tests.policy.checkpoints import NormWithExtraState


class Harm:
    """Leaves a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def _pickled(harm: Harm) -> bytes:
    return pickle.dumps(harm)


def _in_metadata(directory: Path, harm: Harm) -> Callable[[], Any]:
    (directory / METADATA).write_bytes(_pickled(harm))
    return lambda: pickle.loads((directory / METADATA).read_bytes())


def _in_common(directory: Path, harm: Harm) -> Callable[[], Any]:
    """Under the variable that has torch.load unpickle whatever it finds."""
    torch.save({"optimizer": harm}, directory / "common.pt")
    return lambda: torch.load(directory / "common.pt", weights_only=False)


def _in_bytes_item(directory: Path, harm: Harm, item: Any = None) -> Callable[[], Any]:
    """In place of a norm's extra state, which lies as bytes beside the tensors."""
    metadata = read_metadata(directory)
    index = next(index for index in metadata.storage_data if index.fqn.startswith("decoder.final_layernorm._extra"))
    place = metadata.storage_data[index]
    content = io.BytesIO()
    torch.save([harm if item is None else item], content)
    path = directory / place.relative_path
    place.offset, place.length = path.stat().st_size, content.tell()
    with path.open("ab") as file:
        file.write(content.getvalue())
    (directory / METADATA).write_bytes(pickle.dumps(metadata))
    return lambda: torch.load(io.BytesIO(content.getvalue()), weights_only=False)


def _in_extra_state(directory: Path, harm: Harm) -> Callable[[], Any]:
    """In a tensor of bytes, which is plain until the layer unpickles it."""
    data = _pickled(harm)
    _in_bytes_item(directory, harm, torch.frombuffer(bytearray(data), dtype=torch.uint8))
    return lambda: pickle.loads(data)


def _in_extra_states_storage(directory: Path, harm: Harm) -> Callable[[], Any]:
    """In the storage of a tensor in such a pickle, which torch would unpickle in its turn."""
    content = io.BytesIO()
    torch.save(harm, content)

    class Storage:
        def __reduce__(self) -> tuple[Any, ...]:
            return torch.storage._load_from_bytes, (content.getvalue(),)

    data = pickle.dumps({"scale_fwd": Storage()})
    _in_bytes_item(directory, harm, torch.frombuffer(bytearray(data), dtype=torch.uint8))
    return lambda: torch.load(io.BytesIO(content.getvalue()), weights_only=False)


PLACES = {
    "metadata": _in_metadata,
    "common.pt": _in_common,
    "bytes": _in_bytes_item,
    "extra state": _in_extra_state,
    "storage": _in_extra_states_storage,
}


def refusals(model_dir: str, directory: str) -> dict[str, Any]:
    """By place: the refusal, whether the pickle ran, and whether it runs where it is unpickled (the control)."""
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    platform.start_process_group(60)
    model.start_model_parallel(Config().parallel, seed=0)
    policy = checkpoints._policy(model_dir, NormWithExtraState)
    good = checkpoints._save(policy, model_dir, Path(directory))
    found: dict[str, Any] = {}
    for name, plant in PLACES.items():
        spoilt = Path(shutil.copytree(good, Path(directory, "spoilt", good.name), dirs_exist_ok=True))
        harm = Harm(Path(directory, f"harm in {name}"))
        unpickle = plant(spoilt, harm)
        try:
            checkpoint.load(policy, spoilt)
            said = ""
        except FipoError as error:
            said = str(error)
        ran = harm.mark.exists()
        with contextlib.suppress(FileExistsError):
            unpickle()
        found[name] = {"said": said, "ran": ran, "control ran": harm.mark.exists()}
        shutil.rmtree(spoilt)
    checkpoint.load(policy, good)
    assert torch.serialization.get_safe_globals(), "what was allowed before is allowed again"
    platform.stop_process_group()
    return found
