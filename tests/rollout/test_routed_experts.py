"""Why: choices of experts come with the end of a response alone, of prompt and response together. One that is laid to
another token, or is lost with a part, a turn or a restart, replays noise.

A made-up engine behind the real route; from there the real code, to the bytes that a trainer's rank reads. Whether a
real engine's choices are its own needs CUDA (tests/gpu/test_runs.py); a real one on a CPU has to refuse.
"""

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy
import pytest
from safetensors.numpy import save_file

from megatron_fipo.engines.generate_messages import (
    GENERATE_PATH,
    EndFrame,
    ErrorFrame,
    GenerateRequest,
    PartFrame,
    SampleFrame,
    read_about,
)
from megatron_fipo.errors import DataError, RolloutError
from megatron_fipo.records.problem import Problem, prompt_ids
from megatron_fipo.records.routes import UNKNOWN_BYTE, RouteFormat
from megatron_fipo.records.rows import PIECE
from megatron_fipo.records.sample import Partial, RewardResult, Sample
from megatron_fipo.records.streams import ROUTED_EXPERTS
from megatron_fipo.records.wire import FrameReader
from megatron_fipo.rollout import saved_groups
from megatron_fipo.rollout.answers import Answer, Asked, BadAnswer
from megatron_fipo.rollout.saved_groups import Saved
from megatron_fipo.rollout.store import NotHere, SampleStore
from megatron_fipo.rollout.transcript import Transcript
from tests.rollout.conftest import Rollout
from tests.rollout.engines import STOP_TOKEN, generate, problems, sampling
from tests.rollout.made_up_answers import VERSION, part, sample

FORM = RouteFormat((0, 2), 2, 200)
PROMPT = [9, 8, 7]


def choices(tokens: int, engine: int = 0) -> numpy.ndarray:
    """What this engine would choose for the first so many tokens, all different, [tokens, 3 layers, 2]."""
    return (numpy.arange(tokens * 6).reshape(tokens, 3, 2) + 60 * engine).astype(numpy.uint8)


def bytes_of(tokens: int, engine: int = 0) -> numpy.ndarray:
    return FORM.packed(choices(tokens - 1, engine), tokens)


class MadeUpEngine:
    """Answers each request with [5, 7, stop] one token at a time; the last answer has the experts, if any has."""

    def __init__(self, *, has_routes: bool = True):
        self.has_routes = has_routes

    async def generate(self, prompt: Any, parameters: Any, name: str) -> AsyncIterator[Any]:
        sampled = [5, 7, STOP_TOKEN]
        for place, token in enumerate(sampled):
            ends = place == len(sampled) - 1
            tokens = len(prompt["prompt_token_ids"]) + len(sampled)
            output = SimpleNamespace(
                token_ids=[token],
                logprobs=SimpleNamespace(logprobs=[-0.5]),
                finish_reason="stop" if ends else None,
                weight_versions=[SimpleNamespace(version=str(VERSION), start=0, end=3)],
                routed_experts=choices(tokens - 1) if ends and self.has_routes else None,
            )
            yield SimpleNamespace(outputs=[output], finished=ends)


def asked_of(engine: MadeUpEngine, begun: list[int], routes: RouteFormat | None) -> list[Any]:
    """What the route answers: samples and parts as the client reads them, or an ErrorFrame."""
    from megatron_fipo.engines.generate_route import GenerateRoute

    request = GenerateRequest(PROMPT, [1], 1.0, 1.0, -1, 24, [STOP_TOKEN], "", [begun], 2, routes)
    sent: list[bytes] = []

    async def receive() -> Any:
        if not sent:
            return {"type": "http.request", "body": msgspec.json.encode(request)}
        return await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))

    app = SimpleNamespace(state=SimpleNamespace(engine_client=engine))
    scope = {"type": "http", "path": GENERATE_PATH, "method": "POST", "app": app}
    asyncio.run(GenerateRoute(None)(scope, receive, send))
    before = {0: begun_of(begun)} if begun else {}
    answer = Answer(Asked(1, 24, [STOP_TOKEN], 96, VERSION, len(PROMPT), routes), before)
    found: list[Any] = []
    for frame in FrameReader().feed(b"".join(sent)):
        about = read_about(frame.about)
        if isinstance(about, PartFrame | SampleFrame):
            found.append(answer.read(frame, about))
        elif not isinstance(about, EndFrame):
            found.append(about)
    return found


def begun_of(token_ids: list[int]) -> Partial:
    log_probs = numpy.full(len(token_ids), -1, numpy.float32)
    return Partial({"token_ids": numpy.array(token_ids, numpy.int32), "rollout_log_probs": log_probs}, VERSION)


@pytest.mark.slow
@pytest.mark.parametrize("begun", [[], [5, 6]], ids=["from its beginning", "of another server"])
def test_a_response_in_parts_ends_with_the_choices_of_all_its_tokens(begun: list[int]) -> None:
    """Those of the prompt too, and of what another server had sampled, which this one has read again."""
    *parts, end = asked_of(MadeUpEngine(), begun, FORM)
    assert isinstance(end, Sample) and [type(each) for each in parts] == [Partial]
    assert not any(ROUTED_EXPERTS in each.streams for each in parts)
    assert end.streams[ROUTED_EXPERTS].tolist() == bytes_of(len(PROMPT) + len(begun) + 3).tolist()
    *_, plain = asked_of(MadeUpEngine(), begun, None)
    assert plain.streams.keys() == {"token_ids", "rollout_log_probs"}, "nobody has asked for them"
    *_, refusal = asked_of(MadeUpEngine(has_routes=False), begun, FORM)
    assert isinstance(refusal, ErrorFrame) and refusal.kind == "refused"
    assert "start it with --enable-return-routed-experts" in refusal.message


@pytest.mark.slow
def test_a_server_without_them_refuses_in_one_line(rollout: Rollout) -> None:
    """vLLM's CPU engine, which samples all the same: a run would go on without a replay."""
    with pytest.raises(RolloutError, match=r"refused a request: ValueError: this server returns no routed experts"):
        generate(rollout.client, problems(1), 1, sampling(routes=FORM), [0])


@pytest.mark.parametrize(
    ("content", "routes", "words"),
    [
        (sample(0), FORM, "has no routed_experts where it should not"),
        (sample(0, routed_experts=bytes_of(6)), None, "has routed_experts where it should not"),
        (part(0, routed_experts=bytes_of(5)), FORM, "has routed_experts where it should not"),
        (sample(0, routed_experts=bytes_of(5)), FORM, r"routed_experts as \[5, 4\], and should have \[6, 4\]"),
        (sample(0, routed_experts=bytes_of(6)[:, :2]), FORM, r"as \[6, 2\], and should have \[6, 4\]"),
        (sample(0, routed_experts=bytes_of(6)[:, 0]), FORM, r"as uint8 \[6\], and should have uint8 in two dim"),
        (sample(0, routed_experts=bytes_of(6).astype(numpy.int32)), FORM, "routed_experts as int32"),
        (sample(0, routed_experts=bytes_of(2)), FORM, "routed_experts of 2 tokens, and 3 tokens"),
        (sample(0, routed_experts=bytes_of(6, 3)), FORM, "response 0 has the expert 2.*; a layer has 0 to 199"),
        (sample(0, routed_experts=numpy.zeros((6, 4), numpy.uint8)), FORM, "goes to one expert twice"),
        (sample(0, routed_experts=numpy.full((6, 4), UNKNOWN_BYTE, numpy.uint8)), FORM, "before its last of which no"),
    ],
)
def test_choices_that_were_not_asked_for_are_refused(content: bytes, routes: RouteFormat | None, words: str) -> None:
    (frame,) = FrameReader().feed(content)
    about = read_about(frame.about)
    assert isinstance(about, PartFrame | SampleFrame)
    with pytest.raises(BadAnswer, match=words):
        Answer(Asked(1, 24, [STOP_TOKEN], 96, VERSION, len(PROMPT), routes)).read(frame, about)


def whole(prompt: int, engine: int = 0) -> Sample:
    """Three tokens after a prompt of so many, with an engine's choices of all."""
    (frame,) = FrameReader().feed(sample(0, routed_experts=bytes_of(prompt + 3, engine)))
    about = read_about(frame.about)
    assert isinstance(about, SampleFrame)
    found = Answer(Asked(1, 24, [STOP_TOKEN], 96, VERSION, prompt, FORM)).read(frame, about)
    assert isinstance(found, Sample)
    return found


def problem() -> Problem:
    return Problem("p", "", prompt_ids(PROMPT), "7", "test")


def test_a_sample_of_several_turns_has_the_last_ones_choices() -> None:
    """Its request's prompt was all that came before, context and the end of the turn before included."""
    transcript = Transcript(problem())
    transcript.act(whole(3, engine=0))
    transcript.tell([11, 12])
    transcript.act(whole(8, engine=1))
    assert transcript.sample("stop").streams[ROUTED_EXPERTS].tolist() == bytes_of(11, engine=1).tolist()
    transcript.tell([13])
    assert len(transcript.sample("environment").streams[ROUTED_EXPERTS]) == 11, "what nobody answered is left out"
    assert ROUTED_EXPERTS not in Transcript(problem()).sample("environment").streams


def test_a_checkpoint_keeps_choices_of_samples_that_have_them(tmp_path: Path) -> None:
    """Beside one that came without, and one that has only begun."""
    judged = dataclasses.replace(whole(3, engine=1), result=RewardResult(1.0, 1.0, "7", "judged"))
    plain = dataclasses.replace(judged, streams=begun_of([5, 7, 2]).streams)
    saved = [Saved(problem(), [judged, plain, begun_of([5])]), Saved(problem(), [dataclasses.replace(judged)])]
    path = tmp_path / "samples.safetensors"

    def resumed(groups: list[Saved]) -> list[Saved]:
        rows, arrays = saved_groups.pack(groups)
        rows = msgspec.json.decode(json.dumps(msgspec.to_builtins(rows)), type=list[saved_groups.GroupRow])
        save_file(arrays, path)
        found = saved_groups.read(path, rows, described_by=path)
        saved_groups.check(found, path, 96)
        return saved_groups.unpack(rows, found, path)

    assert [list(group.samples) for group in resumed(saved)] == [list(group.samples) for group in saved]
    assert ROUTED_EXPERTS not in resumed([Saved(problem(), [plain])])[0].samples[0].streams
    rows, arrays = saved_groups.pack(saved)
    save_file({**arrays, "response_routed_experts": arrays["response_routed_experts"][:-1]}, path)
    with pytest.raises(DataError, match=r"response_routed_experts is U8 of shape \[47\], and should be .* \[48\]"):
        saved_groups.read(path, rows, described_by=path)


def test_a_store_gives_each_rank_its_layers_bytes() -> None:
    """Of the prompt too; and where a sample came without, those that say so."""
    store = SampleStore()
    held, without = whole(3), begun_of([5, 7, 2])
    numbers = [store.put(prompt_ids(PROMPT), each.streams) for each in (held, without)]
    pieces = numpy.array([(numbers[0], 1, 5), (numbers[1], 2, 4)], PIECE)
    for columns in ((0, 4), (2, 4), (0, 2)):
        found = store.read(pieces, ["token_ids", ROUTED_EXPERTS], columns)[ROUTED_EXPERTS]
        assert found[:4].tolist() == bytes_of(6)[1:5, slice(*columns)].tolist()
        assert (found[4:] == UNKNOWN_BYTE).all() and found.shape == (6, columns[1] - columns[0])
    with pytest.raises(NotHere, match="routed_experts has 4 bytes a token, and 2 to 6 were asked for"):
        store.read(pieces, [ROUTED_EXPERTS], (2, 6))
