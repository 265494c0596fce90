"""Why: a store that gives a token of another place, or of another sample, trains on noise; and whoever reaches its port
could read what is trained on.

Against the real server. That ranks agree when it fails is in tests/policy/test_feed.py.
"""

from collections.abc import Iterator

import httpx
import numpy
import psutil
import pytest

from megatron_fipo.errors import RolloutError
from megatron_fipo.policy import store_reader
from megatron_fipo.policy.store_reader import StoreReader
from megatron_fipo.processes.addresses import listen_for_ranks
from megatron_fipo.records.fetch_messages import FETCH_PATH, encode_request
from megatron_fipo.records.rows import PIECE, StoreAddress
from megatron_fipo.records.wire import encode_frame
from megatron_fipo.rollout.store import NotHere, SampleStore
from megatron_fipo.rollout.store_server import StoreServer
from megatron_fipo.weights.deadline import Deadline

NAMES = ["token_ids", "rollout_log_probs"]
PROMPTS, RESPONSES = (3, 1, 4), (5, 2, 9)


def filled() -> tuple[SampleStore, list[int], list[numpy.ndarray], list[numpy.ndarray]]:
    """A store, its samples' numbers, and what each has of token ids and of log-probs, prompt included."""
    store, numbers, ids, log_probs = SampleStore(), [], [], []
    for place, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        tokens = numpy.arange(prompt + response, dtype=numpy.int32) + 100 * place
        values = -numpy.arange(1, response + 1, dtype=numpy.float32) - place
        numbers.append(store.put(tokens[:prompt], {"token_ids": tokens[prompt:], "rollout_log_probs": values}))
        ids.append(tokens)
        log_probs.append(numpy.concatenate([numpy.zeros(prompt, numpy.float32), values]))
    return store, numbers, ids, log_probs


@pytest.fixture
def server() -> Iterator[tuple[StoreServer, SampleStore, list[int]]]:
    store, numbers, *_ = filled()
    served = StoreServer(store)
    yield served, store, numbers
    served.close()


def pieces(*found: tuple[int, int, int]) -> numpy.ndarray:
    return numpy.array(list(found), PIECE)


def test_every_piece_of_every_sample_is_its_own() -> None:
    store, numbers, ids, log_probs = filled()
    asked, expected = [], {"token_ids": [], "rollout_log_probs": []}
    for place, number in enumerate(numbers):
        for start in range(len(ids[place])):
            for end in range(start + 1, len(ids[place]) + 1):
                asked.append((number, start, end))
                expected["token_ids"].append(ids[place][start:end])
                expected["rollout_log_probs"].append(log_probs[place][start:end])
    found = store.read(pieces(*asked), NAMES)
    for name, parts in expected.items():
        assert numpy.array_equal(found[name], numpy.concatenate(parts)) and found[name].dtype == parts[0].dtype
    assert list(store.read(pieces(), ["token_ids"])) == ["token_ids"]


@pytest.mark.parametrize("piece", [(99, 0, 1), (0, 0, 9), (0, 3, 3), (0, -1, 2), (0, 4, 2)])
def test_what_is_not_there_is_refused(piece: tuple[int, int, int]) -> None:
    store, *_ = filled()
    with pytest.raises(NotHere):
        store.read(pieces(piece), NAMES)
    with pytest.raises(NotHere, match="samples have no old_log_probs"):
        store.read(pieces((0, 0, 1)), ["old_log_probs"])


def test_a_batch_that_is_done_is_forgotten() -> None:
    store, numbers, *_ = filled()
    store.drop([numbers[1], 77])
    assert len(store) == 2
    with pytest.raises(NotHere, match=f"sample {numbers[1]} is not in the store"):
        store.read(pieces((numbers[1], 0, 1)), NAMES)
    assert store.put(numpy.zeros(1, numpy.int32), {}) not in numbers, "no number is used again"


@pytest.mark.parametrize("answer_bytes", [1, 50, 1 << 20])
def test_many_answers_are_one_reading(
    monkeypatch: pytest.MonkeyPatch, server: tuple[StoreServer, SampleStore, list[int]], answer_bytes: int
) -> None:
    served, store, numbers = server
    monkeypatch.setattr(store_reader, "ANSWER_BYTES", answer_bytes)
    asked = pieces(*[(number, start, start + 3) for number in numbers for start in (0, 0)], (numbers[2], 1, 13))
    with StoreReader(served.address, Deadline(20)) as reader:
        found = reader.read(asked, NAMES)
    for name, values in store.read(asked, NAMES).items():
        assert numpy.array_equal(found[name], values)


@pytest.mark.parametrize("authorization", [None, "Bearer wrong", "Bearer", "token"])
@pytest.mark.parametrize("path", [FETCH_PATH, "/", "/docs"])
def test_nothing_answers_without_the_token(
    server: tuple[StoreServer, SampleStore, list[int]], authorization: str | None, path: str
) -> None:
    served, _, numbers = server
    headers = {"Authorization": authorization} if authorization else {}
    body = encode_request(pieces((numbers[0], 0, 1)), NAMES)
    url = served.address.url
    assert httpx.post(f"{url}{path}", content=body, headers=headers, trust_env=False).status_code == 401
    right = {"Authorization": f"Bearer {served.address.token}"}
    found = httpx.post(f"{url}{path}", content=body, headers=right, trust_env=False)
    assert found.status_code == (200 if path == FETCH_PATH else 404), "the control"


def test_a_reader_with_another_token_says_what_is_wrong(server: tuple[StoreServer, SampleStore, list[int]]) -> None:
    served, _, numbers = server
    with (
        StoreReader(StoreAddress(served.address.url, "other"), Deadline(20)) as reader,
        pytest.raises(RolloutError, match="refuses with 401"),
    ):
        reader.read(pieces((numbers[0], 0, 1)), NAMES)
    with (
        StoreReader(served.address, Deadline(20)) as reader,
        pytest.raises(RolloutError, match="410: sample 99 is not in the store"),
    ):
        reader.read(pieces((99, 0, 1)), NAMES)


@pytest.mark.parametrize(
    "body",
    [b"", b"nonsense", encode_frame({"streams": NAMES}), encode_frame({"streams": 1}), encode_request(pieces(), ["x"])],
)
def test_a_request_that_is_none_is_refused_and_the_next_is_served(
    server: tuple[StoreServer, SampleStore, list[int]], body: bytes
) -> None:
    served, _, numbers = server
    headers = {"Authorization": f"Bearer {served.address.token}"}
    found = httpx.post(served.address.url + FETCH_PATH, content=body, headers=headers, trust_env=False)
    assert found.status_code in (400, 410) and found.text
    with StoreReader(served.address, Deadline(20)) as reader:
        assert reader.read(pieces((numbers[0], 0, 2)), ["token_ids"])["token_ids"].tolist() == [0, 1]


def test_it_listens_on_loopback_alone_where_all_ranks_are_on_one_machine(
    monkeypatch: pytest.MonkeyPatch, server: tuple[StoreServer, SampleStore, list[int]]
) -> None:
    assert served_at(server[0].address) == {"127.0.0.1"}


def test_across_nodes_it_listens_where_the_ranks_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    own = [a.address for found in psutil.net_if_addrs().values() for a in found if a.family.name == "AF_INET"]
    for name, value in (("WORLD_SIZE", "16"), ("LOCAL_WORLD_SIZE", "8")):
        monkeypatch.setenv(name, value)
    for address in [address for address in own if not address.startswith("127.")]:
        monkeypatch.setenv("MASTER_ADDR", address)
        listener, reached_at = listen_for_ranks()
        with listener:
            assert listener.getsockname()[0] == address and reached_at.startswith(f"{address}:")
    # Another node cannot know this one as 127.0.1.1.
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    listener, reached_at = listen_for_ranks()
    with listener:
        assert listener.getsockname()[0] in ("0.0.0.0", "::") and reached_at.startswith("localhost:")


def served_at(address: StoreAddress) -> set[str]:
    port = int(address.url.rsplit(":", 1)[1])
    found = psutil.Process().net_connections("tcp")
    return {each.laddr.ip for each in found if each.status == psutil.CONN_LISTEN and each.laddr.port == port}
