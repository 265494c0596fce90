"""The policy as Hugging Face directories beside a run's checkpoints, to serve and evaluate while it goes on.

They are huggingface/step-000010 of the run's directory, each complete or not there, and go when their checkpoints go.
"""

import re
import shutil
from pathlib import Path

import torch.distributed

from megatron_fipo.data.text_files import complete_text_files
from megatron_fipo.errors import WeightError
from megatron_fipo.policy.update import Policy
from megatron_fipo.weights.reshard import save_huggingface

_OURS = re.compile(r"(?P<unfinished>\.)?(?P<step>step-\d{6,})(?(unfinished)\.partial)")


def save(policy: Policy, checkpoint: Path, directory: Path, model_dir: Path) -> str:
    """Write the directory of the same name as `checkpoint`; every rank calls this together.

    Args:
        directory: the run's directory of these, on storage that all ranks share.
        model_dir: where configuration and tokenizer are copied from.

    Returns:
        What went wrong, the same on every rank; then nothing has been written. Empty if nothing did.
    """
    target = directory / checkpoint.name
    if torch.distributed.get_rank() == 0:
        shutil.rmtree(target, ignore_errors=True)  # of a run that went back to an older checkpoint
    try:
        save_huggingface(policy.chunks, policy.model_config, model_dir, target, complete=complete_text_files)
    except WeightError as error:
        return str(error)
    return ""


def prune(directory: Path, checkpoint: Path) -> None:
    """Remove the directories whose checkpoints are gone, and what a killed run has left half-written. On rank 0.

    `checkpoint` is the newest. What cannot be removed stays until the next call.
    """
    for path in directory.iterdir() if directory.is_dir() else ():
        ours = _OURS.fullmatch(path.name)
        if ours is None or path.name == checkpoint.name:
            continue
        if ours["unfinished"] or not checkpoint.with_name(ours["step"]).exists():
            shutil.rmtree(path, ignore_errors=True)
