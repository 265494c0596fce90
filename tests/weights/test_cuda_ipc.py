"""Why: what goes over the network in place of a pickle has to come back as it was, and nothing else be taken for it.

The parts of CUDA IPC that need no GPU. Memory that one process shares with another is in tests/gpu/test_weights.py.
"""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from megatron_fipo.config import RolloutConfig
from megatron_fipo.errors import ConfigError
from megatron_fipo.weights.transport_records import CudaHandle, from_wire
from megatron_fipo.weights.transports import make_transport

HANDLE = CudaHandle(bytes(range(65)), 1 << 20, 512, b"/torch_17_1", 3, bytes(64), True)
WIRE = msgspec.to_builtins(HANDLE)


def test_a_handle_survives_json() -> None:
    assert from_wire(CudaHandle, json.loads(json.dumps(WIRE))) == HANDLE


@pytest.mark.parametrize(
    "spoilt",
    [
        WIRE[:-1],
        [*WIRE, 0],
        [*WIRE[:1], "a number", *WIRE[2:]],
        [*WIRE[:-1], 1],
        [*WIRE[:2], True, *WIRE[3:]],
        ["no base64 &", *WIRE[1:]],
    ],
)
def test_what_is_no_handle_is_refused(spoilt: list[Any]) -> None:
    with pytest.raises(ValueError, match="no CudaHandle: "):
        from_wire(CudaHandle, spoilt)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_without_cuda_the_trainer_says_what_to_choose(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cuda_ipc needs CUDA.*shared_memory or process_group"):
        make_transport(RolloutConfig(weight_transfer="cuda_ipc"), 0, tmp_path)
