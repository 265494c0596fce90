"""Where Megatron-Core 0.16.1, the last for Python 3.11, and 0.19, which needs 3.12, differ; one code serves both.

Each function does what the newer one needs and is harmless with the older one, so that nothing else in the package
asks for a version. CPU stand-ins for names of torch.cuda that only one of them uses are in platform.py.
"""

import io
import logging
from functools import partial
from typing import Any

from packaging.version import Version

from megatron_fipo.errors import FipoError


def installed() -> Version:
    """The version of Megatron-Core that is imported, without the commit of the repository around, which 0.19 adds."""
    import megatron.core

    return Version(Version(megatron.core.__version__).public)


_ADVICE = (
    # To a class that 0.16.1 does not have.
    ("megatron.core.models.gpt.gpt_model", "GPTModel IS DEPRECATED"),
    # To work out beforehand what is worked out here as in 0.16.1.
    ("megatron.core.distributed.distributed_data_parallel", "DistributedDataParallel: full_param_layout not provided"),
    # To a way of saving in the background, which is not used.
    ("megatron.core.dist_checkpointing.strategies.torch", "MCore's async save is deprecated"),
)


def quiet_warnings() -> None:
    """Leave out 0.19's advice to move from what both versions have to what only it has."""
    for name, start in _ADVICE:
        logging.getLogger(name).addFilter(partial(_is_not, start))


def _is_not(start: str, record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(start)


def dequantise(state: dict[str, Any]) -> None:
    """Replace FP8 weights in a sharded state dict, in place, before it is saved or filled from a checkpoint.

    Saving would pickle them as Transformer Engine's objects, which loading refuses. Loading in 0.19 rounds each part
    of a weight by a scale of its own into one that has a single scale: a gated feed-forward's first matrix, whose two
    halves are stored apart, came back wrong by 5 to 21 % in silence. 0.16.1 loads in this way by itself.
    """
    from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8

    force_all_tensors_to_non_fp8(state)


def keep_common(sharded: dict[str, Any], common: dict[str, Any]) -> bytes | None:
    """Have what is no tensor and the same on all ranks saved where the installed version looks for it.

    Args:
        sharded: what is saved by ranks, which 0.19 finds it among: it is added there.
        common: a state dict of plain data.

    Returns:
        In 0.16.1 the content of the file common.pt on rank 0, else None.
    """
    import torch.distributed
    from megatron.core.dist_checkpointing import ShardedObject

    rank = torch.distributed.get_rank()
    if installed() >= Version("0.19"):
        sharded["common_state"] = ShardedObject("common_state", common, (1,), (0,), replica_id=rank)
        return None
    if rank:
        return None
    content = io.BytesIO()
    torch.save(common, content)
    return content.getvalue()


def check_readable(checkpoint: object, written_by: str | None) -> None:
    """Raise FipoError where a newer Megatron-Core wrote a checkpoint: 0.16.1 has no reader for what 0.19 writes.

    Older ones' are read, bit for bit.

    Args:
        checkpoint: its name for the message.
        written_by: the version noted in it; None before versions were noted, which was by 0.16.1.
    """
    if written_by is None:
        return
    written, here = Version(written_by), installed()
    if written.release[:2] > here.release[:2]:
        raise FipoError(
            f"{checkpoint}: cannot be loaded: Megatron-Core {written} wrote it, and {here}, which is installed, reads "
            f"no newer one's checkpoints: install {written.major}.{written.minor} or newer, and the Python it needs"
        )
