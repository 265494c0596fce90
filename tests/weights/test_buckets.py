"""Why: trainer and engine lay buckets out by the same arithmetic, and a slip there would swap weights in silence.

Buckets, their layout and checksums, and the files of the shared-memory transport, without an engine: test_transfer.py
has those.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_fipo.processes.leftovers import SHARED_MEMORY, remove_outside
from megatron_fipo.weights.bucket_layout import BucketLayout
from megatron_fipo.weights.buckets import Bucket, checksum, unpack
from megatron_fipo.weights.transfer_plan import cut_by_size
from megatron_fipo.weights.transport_records import (
    BUCKET_FILE,
    BucketFile,
    BucketHeader,
    SharedMemoryAddress,
    from_wire,
    to_wire,
)
from megatron_fipo.weights.transports import WeightTransport, make_transport
from tests.rollout.engines import rollout_config

NamedTensors = list[tuple[str, Tensor]]


def _named(*sizes: int) -> NamedTensors:
    return [(f"tensor{index}", torch.full((size,), float(index))) for index, size in enumerate(sizes)]


@pytest.mark.parametrize(
    ("sizes", "buckets"),
    [((), []), ((1,), [1]), ((2, 2, 2), [2, 1]), ((100, 1), [1, 1]), ((1, 100, 1), [1, 1, 1]), ((4,), [1])],
)
def test_buckets_keep_order_and_size(sizes: tuple[int, ...], buckets: list[int]) -> None:
    cuts = cut_by_size([4 * size for size in sizes], limit=16)
    assert [end - start for start, end in cuts] == buckets
    assert [index for start, end in cuts for index in range(start, end)] == list(range(len(sizes)))


def test_packing_is_exact_for_mixed_types_and_shapes() -> None:
    tensors = [
        ("half", torch.randn(3, 5).bfloat16()),
        ("strided", torch.randn(4, 6).t()),
        ("empty", torch.zeros(0, 7)),
        ("scalar", torch.tensor(3.5, dtype=torch.float64)),
        ("eight", torch.randn(9).to(torch.float8_e4m3fn)),
    ]
    bucket = Bucket(tensors)
    header = BucketHeader(bucket.layout(), BucketFile("path"), bucket.checksums())
    arrived_header = from_wire(BucketHeader, json.loads(json.dumps(to_wire(header))))
    assert arrived_header == header
    arrived = dict(unpack(bucket.pack(), arrived_header.layout))
    for name, tensor in tensors:
        assert arrived[name].dtype == tensor.dtype
        assert torch.equal(arrived[name].float(), tensor.float()), name


def test_a_checksum_depends_on_every_bit_and_on_the_order() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.uint8):
        tensor = torch.arange(1001).to(dtype)
        sum_ = checksum(tensor)
        assert sum_ == checksum(tensor.clone().reshape(7, 143))
        for word in (0, 500, 1000):
            for bit in range(8 * tensor.itemsize):
                flipped = tensor.clone()
                flipped.view(torch.uint8)[word * tensor.itemsize + bit // 8] ^= 1 << bit % 8
                assert checksum(flipped) != sum_
        assert checksum(tensor.flip(0)) != sum_ and checksum(tensor[:-1]) != sum_
    # Where the bytes lie does not matter: a view that is not aligned, a piece of a packed buffer.
    padded = torch.cat([torch.zeros(1, dtype=torch.uint8), torch.arange(100, dtype=torch.uint8)])
    assert checksum(padded[1:]) == checksum(torch.arange(100, dtype=torch.uint8))
    assert checksum(torch.zeros(4)) != checksum(torch.zeros(6))
    assert checksum(torch.randn(3 << 20)) not in (0, 1), "more than one piece"


def test_a_layout_from_elsewhere_is_checked() -> None:
    with pytest.raises(ValueError, match="2 names has 1 shapes"):
        from_wire(BucketLayout, {"names": ["a", "b"], "shapes": [[1]], "dtypes": ["float32"]})
    with pytest.raises(ValueError, match="'load' is no torch dtype"):
        BucketLayout(("a",), ((1,),), ("load",)).packed_bytes()


@pytest.mark.parametrize(
    "change",
    [
        {"place": {"type": "elsewhere"}},
        {"place": {"type": "shared_memory", "path": 3}},
        {"place": {"type": "shared_memory", "path": "a", "more": 1}},
        {"checksums": ["1"]},
        {"extra": 0},
        {"layout": {"names": ["a"], "shapes": [["1"]], "dtypes": ["float32"]}},
    ],
)
def test_a_header_that_was_not_agreed_is_refused(change: dict[str, Any]) -> None:
    good = to_wire(BucketHeader(BucketLayout(("a",), ((1,),), ("float32",)), BucketFile("path"), (1,)))
    from_wire(BucketHeader, good)
    with pytest.raises(ValueError, match="no BucketHeader: "):
        from_wire(BucketHeader, good | change)


def test_shared_memory_is_private_and_cleaned_up_at_start_and_end(tmp_path: Path) -> None:
    config = rollout_config(weight_transfer="shared_memory")
    transport = make_transport(config, 0, tmp_path)
    directory = _directory(transport)
    assert directory.parent == SHARED_MEMORY and directory.stat().st_mode & 0o777 == 0o700
    path = _sent(transport, directory)
    assert path.is_file()
    # A run that was killed here leaves the file; the next start of the same run removes it.
    transport = make_transport(config, 0, tmp_path)
    transport.open(1)
    assert list(directory.iterdir()) == []
    path = _sent(transport, directory)
    transport.sent()
    assert not path.exists()
    killed = _directory(make_transport(config, 1, tmp_path))
    transport.close()
    assert not directory.exists() and killed.exists()
    remove_outside(tmp_path)  # as every rank does at its end
    assert not killed.exists()


def _directory(transport: WeightTransport) -> Path:
    address = transport.open(1)
    assert isinstance(address, SharedMemoryAddress)
    return Path(address.directory)


def _sent(transport: WeightTransport, directory: Path) -> Path:
    place = transport.send(Bucket(_named(4))).place
    assert isinstance(place, BucketFile)
    return directory / BUCKET_FILE
