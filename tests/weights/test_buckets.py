"""Why: trainer and engine lay buckets out by the same arithmetic, and a slip there would swap weights in silence.

Buckets, their layout and checksums, and the files of the shared-memory plane, without an engine: test_transfer.py has
those.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_fipo.processes.leftovers import SHARED_MEMORY, remove_outside
from megatron_fipo.weights.buckets import Bucket, BucketLayout, checksum, cut_buckets, unpack
from megatron_fipo.weights.planes import make_plane
from tests.rollout.engines import rollout_config

NamedTensors = list[tuple[str, Tensor]]


def _named(*sizes: int) -> NamedTensors:
    return [(f"tensor{index}", torch.full((size,), float(index))) for index, size in enumerate(sizes)]


@pytest.mark.parametrize(
    ("sizes", "buckets"),
    [((), []), ((1,), [1]), ((2, 2, 2), [2, 1]), ((100, 1), [1, 1]), ((1, 100, 1), [1, 1, 1]), ((4,), [1])],
)
def test_buckets_keep_order_and_size(sizes: tuple[int, ...], buckets: list[int]) -> None:
    cut = list(cut_buckets(_named(*sizes), bucket_bytes=16))
    assert [len(bucket.tensors) for bucket in cut] == buckets
    assert [name for bucket in cut for name, _ in bucket.tensors] == [name for name, _ in _named(*sizes)]


def test_packing_is_exact_for_mixed_types_and_shapes() -> None:
    tensors = [
        ("half", torch.randn(3, 5).bfloat16()),
        ("strided", torch.randn(4, 6).t()),
        ("empty", torch.zeros(0, 7)),
        ("scalar", torch.tensor(3.5, dtype=torch.float64)),
        ("eight", torch.randn(9).to(torch.float8_e4m3fn)),
    ]
    bucket = Bucket(tensors)
    layout = BucketLayout(**bucket.layout().to_dict())
    arrived = dict(unpack(bucket.pack(), layout))
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
        BucketLayout(["a", "b"], [[1]], ["float32"])
    with pytest.raises(ValueError, match="'load' is no torch dtype"):
        BucketLayout(["a"], [[1]], ["load"]).packed_bytes()


def test_shared_memory_is_private_and_cleaned_up_at_start_and_end(tmp_path: Path) -> None:
    config = rollout_config(weight_transfer="shared_memory")
    plane = make_plane(config, 0, tmp_path)
    directory = Path(plane.open(1)["directory"])
    assert directory.parent == SHARED_MEMORY and directory.stat().st_mode & 0o777 == 0o700
    path = Path(plane.send(Bucket(_named(4)))["path"])
    assert path.is_file()
    # A run that was killed here leaves the file; the next start of the same run removes it.
    plane = make_plane(config, 0, tmp_path)
    plane.open(1)
    assert list(directory.iterdir()) == []
    path = Path(plane.send(Bucket(_named(4)))["path"])
    plane.sent()
    assert not path.exists()
    killed = Path(make_plane(config, 1, tmp_path).open(1)["directory"])
    plane.close()
    assert not directory.exists() and killed.exists()
    remove_outside(tmp_path)  # as every rank does at its end
    assert not killed.exists()
