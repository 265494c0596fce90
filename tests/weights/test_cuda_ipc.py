"""Why: what goes over the network in place of a pickle has to come back as it was, and nothing else be taken for it.

The parts of CUDA IPC that need no GPU. Memory that one process shares with another is in tests/gpu/test_weights.py.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fipo.config import RolloutConfig
from megatron_fipo.errors import ConfigError
from megatron_fipo.weights.cuda_ipc import decode_handle, encode_handle
from megatron_fipo.weights.planes import make_plane

HANDLE = [bytes(range(65)), 1 << 20, 512, b"/torch_17_1", 3, bytes(64), True]


def test_a_handle_survives_json() -> None:
    assert decode_handle(json.loads(json.dumps(encode_handle(HANDLE)))) == HANDLE


@pytest.mark.parametrize(
    "spoilt",
    [
        HANDLE[:-1],
        [*HANDLE, 0],
        [*HANDLE[:1], "a number", *HANDLE[2:]],
        [*HANDLE[:-1], 1],
        [*HANDLE[:2], True, *HANDLE[3:]],
    ],
)
def test_what_is_no_handle_is_refused(spoilt: list[Any]) -> None:
    with pytest.raises(ValueError, match="has other parts"):
        decode_handle(encode_handle(spoilt))


def test_text_that_is_no_base64_is_refused() -> None:
    handle = encode_handle(HANDLE)
    handle[0] = "no base64 &"
    with pytest.raises(ValueError, match="base64"):
        decode_handle(handle)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_without_cuda_the_trainer_says_what_to_choose(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cuda_ipc needs CUDA.*shared_memory or process_group"):
        make_plane(RolloutConfig(weight_transfer="cuda_ipc"), 0, tmp_path)
