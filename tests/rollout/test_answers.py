"""Why: what a broken, foreign or half-updated server answers must never be trained on, and one such must not end a run.

A web server speaks the route of the real ones here and lies in one way after another. The route itself is tested
against the real engine in test_generator.py.
"""

import dataclasses
import gc
import time
from pathlib import Path

import numpy
import pytest

from megatron_fipo.engines import watch
from megatron_fipo.engines.access import TOKEN_VARIABLE
from megatron_fipo.engines.generate_messages import (
    ErrorFrame,
    GenerateRequest,
    PartFrame,
    SampleFrame,
    read_about,
)
from megatron_fipo.engines.states import State
from megatron_fipo.errors import RolloutError
from megatron_fipo.records import streams
from megatron_fipo.records.sample import Group, Partial, Sample
from megatron_fipo.records.wire import FrameReader, encode_frame
from megatron_fipo.rollout.answers import Answer, Asked, BadAnswer
from tests.rollout.engines import (
    STOP_TOKEN,
    VOCABULARY,
    generate,
    problems,
    sampling,
)
from tests.rollout.made_up_answers import (
    VERSION,
    WRONG,
    Server,
    floats,
    good,
    ints,
    part,
    sample,
    with_first,
)
from tests.rollout.made_up_servers import client_of


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "token")


def test_a_good_answer_is_taken(tmp_path: Path) -> None:
    """The control of all below."""
    with client_of(tmp_path, good) as (client, warnings):
        [group] = generate(client, problems(1), 2, sampling(), [0])
        assert client.retries == 0 and warnings == []
    for found in group.samples:
        assert found.token_ids.tolist() == [5, 7, STOP_TOKEN]
        assert found.streams["rollout_log_probs"].tolist() == [-1, -0.5, -0.25]
        assert (found.finish_reason, found.weight_version) == ("stop", VERSION)


def test_a_group_is_the_one_that_was_announced(tmp_path: Path) -> None:
    """Its verdicts are written into it while others are sampled: in a copy the run would have no verdict at all."""
    arrived: list[Group] = []
    with client_of(tmp_path, good) as (client, _):
        groups = generate(client, problems(4), 2, sampling(), range(4), on_group=arrived.append)
    assert len(arrived) == 4 and {id(group) for group in groups} == {id(group) for group in arrived}


@pytest.mark.parametrize("name", WRONG)
def test_a_server_that_repeats_a_wrong_answer_is_taken_out_and_others_answer(name: str, tmp_path: Path) -> None:
    answer, complaint = WRONG[name]
    with client_of(tmp_path, answer, good) as (client, warnings):
        groups = generate(client, problems(8), 2, sampling(), range(8))
        assert [sample.token_ids.tolist() for group in groups for sample in group.samples] == [[5, 7, 2]] * 16
        [warning] = warnings
        assert "its answers are not what was asked for" in warning and "left out from now on" in warning
        assert client._pool.servers[1].state is State.SERVING
    with client_of(tmp_path, answer) as (client, warnings), pytest.raises(RolloutError, match=complaint):
        generate(client, problems(1), 2, sampling(), [0])


def test_one_wrong_answer_costs_a_request_and_not_the_server(tmp_path: Path) -> None:
    calls: list[int] = []

    def wrong_at_first(request: GenerateRequest) -> list[bytes]:
        calls.append(len(request.seeds))
        return with_first(finish_reason="abort")(request) if len(calls) == 1 else good(request)

    with client_of(tmp_path, wrong_at_first) as (client, warnings):
        assert len(generate(client, problems(3), 2, sampling(), range(3))) == 3
        assert client.retries == 1 and warnings == []


def test_what_has_arrived_is_not_asked_for_again(tmp_path: Path) -> None:
    asked: list[list[int]] = []

    def ends_early(request: GenerateRequest) -> list[bytes]:
        asked.append(request.seeds)
        return (
            [sample(1), encode_frame(ErrorFrame("failed", "EngineDeadError: gone"))]
            if len(asked) == 1
            else good(request)
        )

    with client_of(tmp_path, ends_early) as (client, _):
        [group] = generate(client, problems(1), 3, sampling(), [0])
    first = asked[0][0]
    assert len(group.samples) == 3 and asked == [[first, first + 1, first + 2], [first, first + 2]]


def test_what_has_arrived_in_parts_is_gone_on_with(tmp_path: Path) -> None:
    """The next server is asked for the rest, under another seed; the sample is of both, without a gap."""
    asked: list[GenerateRequest] = []

    def breaks_off(request: GenerateRequest) -> list[bytes]:
        asked.append(request)
        if len(asked) == 1:
            return [part(1), part(1, start=2), sample(0), encode_frame(ErrorFrame("failed", "EngineDeadError: gone"))]
        return good(request)

    with client_of(tmp_path, breaks_off) as (client, warnings):
        [group] = generate(client, problems(1), 2, sampling(), [0])
        steps = [client.end_step() for _ in range(2)]
    first, second = asked
    assert first.begun == [[], []] and second.begun == [[5, 7, 5, 7]] and warnings == []
    assert second.token_ids == first.token_ids and second.max_tokens == first.max_tokens
    assert second.seeds[0] not in first.seeds
    assert steps[0].items() >= {"requests_repeated": 1, "tokens_continued": 4}.items()
    assert steps[1].items() >= {"requests_repeated": 0, "tokens_continued": 0}.items()
    assert [sample.token_ids.tolist() for sample in group.samples] == [[5, 7, 2], [5, 7, 5, 7, 5, 7, 2]]
    assert group.samples[1].streams["rollout_log_probs"].tolist() == [-1, -0.5, -1, -0.5, -1, -0.5, -0.25]
    assert {sample.weight_version for sample in group.samples} == {VERSION}


def test_parts_of_a_wrong_answer_are_not_gone_on_with(tmp_path: Path) -> None:
    """Whoever is wrong in one thing is not believed in the others."""
    asked: list[list[list[int]]] = []

    def wrong_after_a_part(request: GenerateRequest) -> list[bytes]:
        asked.append(request.begun)
        return [part(0), part(0)] if len(asked) == 1 else good(request)

    with client_of(tmp_path, wrong_after_a_part) as (client, _):
        generate(client, problems(1), 2, sampling(), [0])
    assert asked == [[[], []], [[], []]]


def test_a_part_is_of_the_oldest_weights_that_may_have_sampled_it() -> None:
    """An engine names a response's versions at its end; one that is lost before has not."""

    def read(content: bytes, begun: dict[int, Partial]) -> Sample | Partial:
        (frame,) = FrameReader().feed(content)
        about = read_about(frame.about)
        assert isinstance(about, SampleFrame | PartFrame)
        return Answer(Asked(1, 24, [STOP_TOKEN], VOCABULARY, VERSION), begun).read(frame, about)

    begun = read(part(0), {})
    assert isinstance(begun, Partial) and begun.weight_version == VERSION
    older = dataclasses.replace(begun, weight_version=VERSION - 1)
    for before, version in ((begun, VERSION), (older, VERSION - 1)):
        whole = read(sample(0), {0: before})
        assert isinstance(whole, Sample) and (len(whole), whole.weight_version) == (5, version)


def test_a_failure_in_the_engines_words(tmp_path: Path) -> None:
    with (
        client_of(tmp_path, lambda _: [encode_frame(ErrorFrame("failed", "EngineDeadError: gone"))]) as (client, _),
        pytest.raises(RolloutError, match=r"failed 4 times: http://127.*, problem problem-0: .*EngineDeadError: gone"),
    ):
        generate(client, problems(1), 1, sampling(), [0])


def test_a_ctrl_c_in_the_middle_of_a_task_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A signal's handler raises wherever the process is. The tasks that wait for that one would raise it again."""

    def ctrl_c(group: Group) -> None:
        raise KeyboardInterrupt

    with client_of(tmp_path, good) as (client, _):
        with pytest.raises(KeyboardInterrupt):
            generate(client, problems(4), 2, sampling(), range(4), ctrl_c)
        client.close()
        gc.collect()
    assert caplog.text == ""


def test_work_is_dealt_evenly(tmp_path: Path) -> None:
    """The first server got all of it while nothing had begun, and every other one waited."""
    asked: list[list[int]] = [[], []]

    def server(number: int) -> Server:
        def answer(request: GenerateRequest) -> list[bytes]:
            asked[number].append(len(request.seeds))
            return good(request)

        return answer

    with client_of(tmp_path, server(0), server(1)) as (client, _):
        generate(client, problems(8), 4, sampling(), range(8))
    assert min(map(len, asked)) >= 2, asked


@pytest.mark.parametrize("is_updated", [False, True])
def test_a_server_that_comes_back_while_others_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_updated: bool
) -> None:
    """An evaluation takes it back at once. One that needs a run's weights waits for them: that is the control."""
    monkeypatch.setattr(watch, "WATCH_EVERY_S", 0.05)
    said: list[list[str]] = []
    asked_after_its_return: list[bool] = []

    def away_at_first(request: GenerateRequest) -> list[bytes]:
        asked_after_its_return.append(any("is back in service" in warning for warning in said[0]))
        if len(asked_after_its_return) == 1:
            return [encode_frame(ErrorFrame("failed", "EngineDeadError: gone"))]
        return own(request)

    def slow(request: GenerateRequest) -> list[bytes]:
        time.sleep(0.2)
        return own(request)

    def own(request: GenerateRequest) -> list[bytes]:
        return good(request) if is_updated else [part.replace(b'"3"', b'"0"') for part in good(request)]

    with client_of(tmp_path, away_at_first, slow, silent_for={0: 1}) as (client, warnings):
        said.append(warnings)
        pool = client._pool
        pool.config.max_num_seqs = 2
        if not is_updated:
            pool.weight_version = None
        assert len(generate(client, problems(24), 2, sampling(), range(24))) == 24
        assert "taken back when it answers" in warnings[0]
        assert pool.servers[0].state is (State.AWAY if is_updated else State.SERVING)
        assert any(asked_after_its_return) != is_updated
        assert len(warnings) == (1 if is_updated else 2)


def test_the_table_of_streams_says_what_an_answer_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that is added to the table is asked of every answer, checked, and in the sample."""

    def read(**arrays: numpy.ndarray) -> Sample:
        (frame,) = FrameReader().feed(sample(0, **arrays))
        about = read_about(frame.about)
        assert isinstance(about, SampleFrame)
        whole = Answer(Asked(1, 24, [STOP_TOKEN], VOCABULARY, VERSION)).read(frame, about)
        assert isinstance(whole, Sample)
        return whole

    assert read().streams.keys() == {"token_ids", "rollout_log_probs"}
    monkeypatch.setattr(streams, "STREAMS", (*streams.STREAMS, streams.Stream("token_rewards", "float32")))
    assert read(token_rewards=floats(1, 2, 3)).streams["token_rewards"].tolist() == [1, 2, 3]
    for wrong, words in (
        ({}, "and should have token_ids, rollout_log_probs, token_rewards"),
        ({"token_rewards": floats(1, 2)}, "2 token_rewards"),
        ({"token_rewards": ints(1, 2, 3)}, "token_rewards as int32"),
        ({"token_rewards": floats(1, 2, float("nan"))}, "token_rewards that are not finite"),
    ):
        with pytest.raises(BadAnswer, match=words):
            read(**wrong)
