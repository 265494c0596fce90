"""Why: servers and verifiers hang on the rollout process, and the trainer on its answers. Whichever of the two dies has
to take the other along in bounded time, and what went wrong there has to be told here, once, in the user's words.

A real process with real verifiers; its server is an address where nobody answers. Sampling, weight updates and Ctrl-C
through it are tests/end_to_end's matter.
"""

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_type_hints

import httpx
import msgspec
import psutil
import pytest

from megatron_fipo.assets import resolve_embedded
from megatron_fipo.config import Config
from megatron_fipo.config.configure import load_config
from megatron_fipo.engines.access import TOKEN_VARIABLE
from megatron_fipo.errors import FipoError, RolloutError
from megatron_fipo.rollout.events import WeightsWanted
from megatron_fipo.rollout_process import link
from megatron_fipo.rollout_process.call_messages import (
    CALL_PATH,
    METHODS,
    Alive,
    MessageReader,
    Noted,
    Returned,
    Warned,
    decode_arguments,
    decode_result,
    encode,
)
from megatron_fipo.rollout_process.process_start import start_rollout_process
from megatron_fipo.rollout_process.remote import RemoteRollouts
from megatron_fipo.rollout_process.service import RolloutService
from megatron_fipo.tracking.console import Console
from megatron_fipo.weights.bucket_layout import BucketLayout
from megatron_fipo.weights.transport_records import BucketFile, BucketHeader

MODEL = resolve_embedded("embedded:tiny")
GONE_S = 10.0


def make_config(directory: Path, *overrides: str) -> Config:
    nobody = ("rollout.servers=0", "rollout.addresses=[http://127.0.0.1:9]", "reward.workers=1")
    return load_config([f"run.directory={directory}", *nobody, *overrides])


@contextmanager
def opened(directory: Path, *overrides: str) -> Iterator[tuple[RemoteRollouts, psutil.Process, io.StringIO]]:
    """The rollout process of a run, with all that it starts, and what the console shows."""
    shown = io.StringIO()
    process = start_rollout_process(make_config(directory, *overrides))
    with (
        Console(1, file=shown, width=200) as console,
        RemoteRollouts(process, MODEL, directory, console) as rollouts,
    ):
        yield rollouts, psutil.Process(process.pid), shown


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "of the servers")


def test_both_ends_know_the_same_calls() -> None:
    for implementation in (RolloutService, RemoteRollouts):
        for name in METHODS:
            declared, found = getattr(link.RolloutCalls, name), getattr(implementation, name)
            assert get_type_hints(found) == get_type_hints(declared), (implementation, name)


def test_what_a_call_is_given_and_returns_arrives_as_it_was() -> None:
    header = BucketHeader(BucketLayout(("a",), ((1, 2),), ("float32",)), BucketFile("place"), (3,))
    given: dict[str, tuple[Any, ...]] = {"update_weights": (header, 1.5), "begin_batch": (3, 2), "close": ()}
    for name, arguments in given.items():
        assert tuple(decode_arguments(name, msgspec.msgpack.encode(arguments))) == arguments
    offer = link.Offer(b"\0frame", {"nan is lost in JSON": float("inf")})
    for name, result in (("taken", offer), ("wait", WeightsWanted(("http://a",))), ("close", None)):
        assert decode_result(name, msgspec.msgpack.encode(result)) == result
    for name, wrong in (("begin_batch", (3,)), ("begin_batch", (3, "2")), ("close", (1,)), ("settle", {})):
        with pytest.raises(ValueError):
            decode_arguments(name, msgspec.msgpack.encode(wrong))


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_messages_may_be_cut_anywhere(size: int) -> None:
    messages = [Noted("one"), Alive(), Warned("x" * 300), Returned(b"\0\1")]
    whole, reader, found = b"".join(map(encode, messages)), MessageReader(), []
    for start in range(0, len(whole), size):
        found += reader.feed(whole[start : start + size])
    assert found == messages
    with pytest.raises(ValueError, match="a message of"):
        list(MessageReader().feed(b"\xff\xff\xff\xff"))


@pytest.mark.slow
class TestProcess:
    def test_it_answers_whoever_has_the_token_and_ends_when_it_is_closed(self, tmp_path: Path) -> None:
        with opened(tmp_path) as (rollouts, process, shown):
            assert "problems: rows" in shown.getvalue()
            everything = [process, *process.children(recursive=True)]
            assert len(everything) > 1, "a verifier is there"
            number = rollouts.snapshot()
            rollouts.write_snapshot(number, str(tmp_path))
            assert (tmp_path / "rollout" / "ledger.json").exists()
            with pytest.raises(RolloutError, match="the rollout process failed: KeyError"):
                rollouts.write_snapshot(number, str(tmp_path))
            address = rollouts._address
            for headers, path, status in (
                ({}, "snapshot", 401),
                ({"Authorization": "Bearer no"}, "snapshot", 401),
                ({"Authorization": f"Bearer {address.token}"}, "__init__", 404),
                ({"Authorization": f"Bearer {address.token}"}, "snapshot", 200),
            ):
                url = address.url + CALL_PATH + path
                assert httpx.post(url, content=b"\x90", headers=headers, trust_env=False).status_code == status
            assert address.url.startswith("http://127.0.0.1:")
        assert not any(map(psutil.Process.is_running, everything))

    def test_what_is_refused_there_is_refused_here(self, tmp_path: Path) -> None:
        with (
            pytest.raises(FipoError, match=r"missing\.jsonl") as refused,
            opened(tmp_path, "data.train=[missing.jsonl]"),
        ):
            pass
        assert refused.value.exit_code == 2

    def test_its_death_is_told_at_once(self, tmp_path: Path) -> None:
        with opened(tmp_path) as (rollouts, process, _):
            everything = [process, *process.children(recursive=True)]
            process.kill()
            started = time.monotonic()
            with pytest.raises(RolloutError, match="the rollout process was ended by signal 9"):
                rollouts.roster()
            assert time.monotonic() - started < GONE_S
            psutil.wait_procs(everything, timeout=GONE_S)
            assert not any(map(psutil.Process.is_running, everything))

    @pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
    def test_it_goes_with_rank_0(self, tmp_path: Path, how: signal.Signals) -> None:
        program = (
            "import sys, time; from pathlib import Path; from tests.rollout_process.test_link import opened\n"
            "with opened(Path(sys.argv[1])) as (_, process, shown):\n"
            "    print(process.pid, flush=True); time.sleep(600)\n"
        )
        command = [sys.executable, "-c", program, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": os.getcwd()}) as rank_0:
            assert rank_0.stdout is not None
            process = psutil.Process(int(rank_0.stdout.readline()))
            everything = [process, *process.children(recursive=True)]
            rank_0.send_signal(how)
            _, left = psutil.wait_procs(everything, timeout=GONE_S)
            assert not left
