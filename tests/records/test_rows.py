"""Why: every rank plans from these rows, and a plan that differs from rank to rank hangs a run. Bytes that are no batch
are refused, and the batch of a large run stays small.

Not covered: the broadcast (tests/policy/test_feed.py).
"""

import msgspec
import numpy
import pytest

from megatron_fipo.records.rows import ROW, StoreAddress, TrainBatch, rows_of, told_stretches
from megatron_fipo.records.wire import WireError, encode_frame

ADDRESS = StoreAddress("http://127.0.0.1:1", "secret")


def make_batch(sizes: tuple[int, ...] = (2, 1)) -> TrainBatch:
    count = sum(sizes)
    lengths = range(5, 5 + count)
    rows = rows_of(range(7, 7 + count), lengths, [2] * count, [0.1] * count, [0] * count, sizes)
    told = [(0, 2, 3), (0, 4, 5), (2, 3, 7)] if count == 3 else []
    return TrainBatch(3, rows, told_stretches(told, rows), ADDRESS)


def frame_of(rows: numpy.ndarray, told: tuple[tuple[int, ...], ...] = ()) -> bytes:
    raw = rows.view(numpy.uint8).reshape(len(rows), -1)
    stretches = numpy.array(told, numpy.int32).reshape(len(told), -1 if told else 3)
    return encode_frame({"step": 1, "store": None}, {"rows": raw, "told": stretches})


def test_a_batch_arrives_as_it_was() -> None:
    batch = make_batch()
    found = TrainBatch.from_bytes(batch.to_bytes())
    assert (found.step, found.store) == (3, ADDRESS)
    assert numpy.array_equal(found.rows, batch.rows) and found.rows.dtype == ROW
    assert found.lengths == [5, 6, 7] and found.mini_batch_sizes == [2, 1]
    assert found.rows["advantage"].dtype == numpy.float32
    assert [found.told_of(row) for row in range(3)] == [[[2, 3], [4, 5]], [], [[3, 7]]]
    with pytest.raises(ValueError, match="read-only"):
        found.rows["tokens"][0] = 1


def test_a_step_may_have_no_sequences() -> None:
    found = TrainBatch.from_bytes(make_batch(()).to_bytes())
    assert len(found) == 0 and found.lengths == [] and found.mini_batch_sizes == []


def test_the_batch_of_a_large_run_is_small() -> None:
    assert len(make_batch((512,) * 16).to_bytes()) <= 500_000


def test_logs_do_not_have_the_token() -> None:
    assert "secret" not in repr(make_batch()) and "secret" in msgspec.json.encode(ADDRESS).decode()


def test_rows_that_are_no_batch_are_refused() -> None:
    good = make_batch().rows

    def changed(name: str, values: list[int]) -> numpy.ndarray:
        rows = good.copy()
        rows[name] = values
        return rows

    assert len(TrainBatch.from_bytes(frame_of(good))) == 3, "the control"
    for rows, message in (
        (changed("mini_batch", [1, 1, 2]), "not in order"),
        (changed("mini_batch", [0, 2, 2]), "not in order"),
        (changed("mini_batch", [0, 1, 0]), "not in order"),
        (changed("prompt", [0, 2, 2]), "without a prompt"),
        (changed("prompt", [5, 2, 2]), "without a response"),
        (changed("tokens", [-5, 6, 7]), "without a response"),
        (changed("sample", [7, 7, 8]), "twice"),
        (numpy.zeros(3, "<i8"), "rows of"),
    ):
        with pytest.raises(WireError, match=message):
            TrainBatch.from_bytes(frame_of(rows))


@pytest.mark.parametrize(
    "about", [{"step": "1", "store": None}, {"step": 1}, {"step": 1, "store": None, "more": 1}, []]
)
def test_a_frame_about_something_else_is_refused(about: object) -> None:
    with pytest.raises(WireError, match="no batch"):
        TrainBatch.from_bytes(encode_frame(about, {"rows": numpy.zeros((1, ROW.itemsize), numpy.uint8)}))


@pytest.mark.parametrize("cut", [0, 3, 16, 40, -1])
def test_a_frame_that_is_cut_short_or_too_long_is_refused(cut: int) -> None:
    whole = make_batch().to_bytes()
    with pytest.raises(WireError):
        TrainBatch.from_bytes(whole[:cut])
    with pytest.raises(WireError, match="its beginning speaks of"):
        TrainBatch.from_bytes(whole + b"x")
