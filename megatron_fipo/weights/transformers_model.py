"""transformers' own reading of a model directory, which knows nothing of our tables: what ours is compared with."""

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_fipo.errors import ConfigError


def transformers_config(model_dir: str | Path) -> Any:
    """The PretrainedConfig of the directory, without asking the network. ConfigError, in one line, if it is refused."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # it validates by exceptions of many classes, some of them Exception's own children
        raise refused(model_dir, error) from error


def refused(model_dir: str | Path, error: Exception) -> ConfigError:
    """What transformers says of a directory that it cannot build, as one line."""
    said = " ".join(str(error).split())[:400]
    remedy = "a config.json that transformers can build"
    return ConfigError("model.path", f"transformers refuses {Path(model_dir) / 'config.json'}: {said}", remedy)


def rotary_frequencies(model_dir: str | Path, last: int) -> tuple[Tensor, float]:
    """Radians a position, [head dimension ÷ 2] in fp32, and the factor on cosine and sine, for positions to `last`.

    Taken from the rotary module that transformers' model of this directory has.
    """
    config = transformers_config(model_dir)
    kind = type(config)
    try:
        models = importlib.import_module(kind.__module__.replace("configuration_", "modeling_"))
        module = getattr(models, kind.__name__.replace("Config", "RotaryEmbedding"))(config)
        module(torch.zeros(1), torch.tensor([[last]]))  # some kinds stretch themselves by the longest position seen
    except Exception as error:
        raise refused(model_dir, error) from error
    return module.inv_freq.float(), float(module.attention_scaling)
