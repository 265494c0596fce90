"""Why: the trainer trusts the tokens, log-probs and versions that the client returns, and repeats a run by its seeds.

Against a real vLLM server on the CPU. Does not cover log-probs after a weight update (tests/weights/test_transfer.py),
nor bf16 or GPU kernels, whose log-probs differ from a direct forward by rounding.
"""

import copy
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import msgspec
import numpy
import pytest
import torch

from megatron_fipo.engines.access import TOKEN_VARIABLE
from megatron_fipo.engines.generate_messages import (
    GENERATE_PATH,
    EndFrame,
    GenerateRequest,
    PartFrame,
    SampleFrame,
    read_about,
)
from megatron_fipo.engines.states import Server, State
from megatron_fipo.errors import RolloutError
from megatron_fipo.records.sample import Group, Partial, Sample
from megatron_fipo.records.streams import ROLLOUT_LOG_PROBS, TOKEN_IDS
from megatron_fipo.records.wire import FrameReader
from megatron_fipo.rollout.answers import Answer, Asked
from megatron_fipo.rollout.generator import EngineGenerator
from tests.rollout.conftest import Rollout
from tests.rollout.engines import (
    MAX_PROMPT,
    STOP_TOKEN,
    VOCABULARY,
    forward_log_probs,
    generate,
    log_prob_error,
    problems,
    sampling,
    serving_pool,
)


def _tokens(groups: list[Group]) -> list[list[list[int]]]:
    return [[sample.token_ids.tolist() for sample in group.samples] for group in groups]


@pytest.mark.slow
def test_log_probs_are_those_of_a_direct_forward(rollout: Rollout) -> None:
    groups = generate(rollout.client, problems(6), 4, sampling(), seeds=range(6))
    errors = [
        log_prob_error(rollout.model, group.problem.token_ids, sample) for group in groups for sample in group.samples
    ]
    assert max(errors) < 1e-4
    assert {sample.weight_version for group in groups for sample in group.samples} == {0}


@pytest.mark.slow
def test_the_same_seeds_give_the_same_tokens_and_others_do_not(rollout: Rollout) -> None:
    # Enough prompt tokens that vLLM, left to itself, would cut prompts up, which kills a CPU engine with seeds.
    asked = problems(70, length=40)
    first = generate(rollout.client, asked, 2, sampling(), seeds=range(70))
    again = generate(rollout.client, asked[::-1], 2, sampling(), seeds=range(69, -1, -1))
    other = generate(rollout.client, asked, 2, sampling(), seeds=range(1, 71))
    assert _tokens(first) == _tokens(again)[::-1]
    assert _tokens(first) != _tokens(other)


@pytest.mark.slow
def test_samples_of_one_group_and_of_neighbouring_seeds_differ(rollout: Rollout) -> None:
    same_prompt = problems(1) * 2
    groups = generate(rollout.client, same_prompt, 4, sampling(), seeds=[5, 6])
    sampled = [tuple(tokens) for group in _tokens(groups) for tokens in group]
    assert len(set(sampled)) == 8


@pytest.mark.slow
def test_greedy_is_the_models_argmax(rollout: Rollout) -> None:
    [group] = generate(rollout.client, problems(1), 2, sampling(temperature=0.0, top_p=1.0), seeds=[0])
    first, second = group.samples
    assert first == second
    tokens = torch.tensor([group.problem.token_ids.tolist() + first.token_ids.tolist()])
    with torch.no_grad():
        best = rollout.model(tokens).logits[0, len(group.problem.token_ids) - 1 : -1].argmax(-1)
    assert best.tolist() == first.token_ids.tolist()
    assert forward_log_probs(rollout.model, group.problem.token_ids, first).mean() < 0


@pytest.mark.slow
def test_a_response_in_parts_is_the_same_and_another_server_can_go_on_with_it(rollout: Rollout) -> None:
    """The parts join to what one frame has; greedy, the rest is what the first server would have sampled."""
    prompt = problems(1)[0].token_ids

    def ask(stream_tokens: int, begun: list[int], temperature: float) -> list[Sample | Partial]:
        asked = Asked(1, 24, [STOP_TOKEN], VOCABULARY, None)
        before = {0: partial_of(begun)} if begun else {}
        answer, reader, found = Answer(asked, before), FrameReader(), []
        request = GenerateRequest(
            prompt.tolist(), [7], temperature, 1.0, -1, 24, [STOP_TOKEN], "parts", [begun], stream_tokens
        )
        url, headers = rollout.pool.servers[0].url + GENERATE_PATH, rollout.pool.headers
        content = msgspec.json.encode(request)
        response = httpx.post(url, content=content, headers=headers, timeout=60, trust_env=False)
        for frame in reader.feed(response.raise_for_status().content):
            about = read_about(frame.about)
            if isinstance(about, EndFrame):
                return found
            assert isinstance(about, PartFrame | SampleFrame), about
            found.append(answer.read(frame, about))
        pytest.fail("no end")

    for temperature in (0.0, 1.0):
        [whole] = ask(10_000, [], temperature)
        *parts, end = ask(5, [], temperature)
        assert end == whole and len(whole) > 12, "the control of what follows: it is long enough to have parts"
        assert [len(part) for part in parts] == [count for count in (6, 11, 16, 21) if count < len(whole)]
        for part in parts:
            assert part.streams[TOKEN_IDS].tolist() == whole.streams[TOKEN_IDS][: len(part)].tolist()
        assert isinstance(end, Sample)
        assert log_prob_error(rollout.model, prompt, end) < 1e-4
        [rest] = ask(10_000, whole.streams[TOKEN_IDS][:9].tolist(), temperature)
        assert isinstance(rest, Sample) and rest.token_ids[:9].tolist() == whole.streams[TOKEN_IDS][:9].tolist()
        same = rest.token_ids.tolist() == whole.streams[TOKEN_IDS].tolist()
        assert same == (temperature == 0), "the random numbers of the first tokens are not those of the tenth"


def partial_of(token_ids: list[int]) -> Partial:
    """The beginning of a response, whose log-probs nobody asks for here."""
    ids = numpy.array(token_ids, numpy.int32)
    return Partial({TOKEN_IDS: ids, ROLLOUT_LOG_PROBS: numpy.zeros(len(ids), numpy.float32)}, None)


@pytest.mark.slow
def test_a_response_ends_at_a_stop_token_kept_in_it_or_at_the_limit(rollout: Rollout) -> None:
    groups = generate(rollout.client, problems(16), 4, sampling(), seeds=range(16))
    samples = [sample for group in groups for sample in group.samples]
    stopped = [sample for sample in samples if sample.finish_reason == "stop"]
    limited = [sample for sample in samples if sample.finish_reason == "length"]
    assert stopped and limited and len(stopped) + len(limited) == len(samples)
    assert all(r.token_ids.tolist().index(STOP_TOKEN) == len(r.token_ids) - 1 for r in stopped)
    assert all(len(r.token_ids) == 24 and STOP_TOKEN not in r.token_ids for r in limited)


@pytest.mark.slow
def test_groups_are_delivered_as_they_arrive_and_returned_in_order(rollout: Rollout) -> None:
    arrived: list[Group] = []
    asked = problems(40)
    groups = generate(rollout.client, asked, 2, sampling(), range(40), arrived.append)
    assert [group.problem.id for group in groups] == [problem.id for problem in asked]
    assert sorted(map(id, arrived)) == sorted(map(id, groups)), "what is judged as it arrives is what is returned"
    assert rollout.client.retries == 0


@pytest.mark.slow
def test_an_error_in_the_callback_is_the_callers(rollout: Rollout) -> None:
    def fail(group: Group) -> None:
        raise ZeroDivisionError(group.problem.id)

    with pytest.raises(ZeroDivisionError):
        generate(rollout.client, problems(4), 2, sampling(), range(4), fail)


@pytest.mark.slow
def test_a_prompt_that_is_too_long_is_refused_by_name(rollout: Rollout) -> None:
    with pytest.raises(RolloutError, match=f"problem-0 .* {MAX_PROMPT + 1} tokens; .*max_prompt_length={MAX_PROMPT}"):
        generate(rollout.client, problems(1, length=MAX_PROMPT + 1), 2, sampling(), [0])


@pytest.mark.slow
def test_a_request_that_the_engine_refuses_is_reported_in_its_words(rollout: Rollout) -> None:
    with pytest.raises(RolloutError, match=r"http://127.* refused a request: .*max_tokens"):
        generate(rollout.client, problems(1), 2, sampling(max_tokens=-3), [0])
    assert rollout.client.retries == 0


@pytest.mark.slow
def test_a_failed_request_goes_to_another_server_and_is_counted(rollout: Rollout) -> None:
    pool = copy.copy(rollout.pool)
    # Nothing listens on port 9: a server on another machine that is away.
    pool.servers = [Server("http://127.0.0.1:9", state=State.SERVING), *pool.servers]
    with EngineGenerator(pool) as client:
        groups = generate(client, problems(3), 2, sampling(), range(3))
        assert 1 <= client.retries <= 3
        assert [server.url for server in pool.in_service] == [rollout.pool.servers[0].url]
    assert _tokens(groups) == _tokens(generate(rollout.client, problems(3), 2, sampling(), range(3)))


def test_without_any_server_the_call_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "token")
    with (
        EngineGenerator(serving_pool(["http://127.0.0.1:9"], tmp_path)) as client,
        pytest.raises(RolloutError, match=r"no vLLM server is left: http://127.0.0.1:9: ConnectError"),
    ):
        generate(client, problems(1), 2, sampling(), [0])


@contextmanager
def _client_of_a_web_server(
    directory: Path, answer: Callable[[BaseHTTPRequestHandler], None]
) -> Iterator[EngineGenerator]:
    """A client whose only address is a web server that is no engine; `answer` gets its POST requests, in threads."""
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (BaseHTTPRequestHandler,), {"do_POST": answer})) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        try:
            with EngineGenerator(serving_pool([f"http://127.0.0.1:{web.server_port}"], directory)) as client:
                yield client
        finally:
            web.shutdown()


def test_an_error_comes_out_by_itself_and_in_no_group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whichever Python runs: they differ in their exception groups. Both requests fail."""
    monkeypatch.setenv(TOKEN_VARIABLE, "token")
    with (
        _client_of_a_web_server(tmp_path, lambda request: request.send_error(404)) as client,
        pytest.raises(RolloutError, match="refused a request with 404"),
    ):
        generate(client, problems(2), 1, sampling(), range(2))


def test_an_interrupt_in_the_middle_of_a_request_is_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "token")
    interrupted = threading.Event()

    def interrupt(request: BaseHTTPRequestHandler) -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        interrupted.wait(60)

    with _client_of_a_web_server(tmp_path, interrupt) as client:
        with pytest.raises(KeyboardInterrupt):
            generate(client, problems(1), 1, sampling(), [0])
        interrupted.set()


@pytest.mark.slow
def test_a_deadline_names_the_problems_that_are_pending(rollout: Rollout) -> None:
    pool = copy.copy(rollout.pool)
    pool.config = copy.copy(pool.config)
    pool.config.request_timeout_s = 0.05
    started = time.monotonic()
    with (
        EngineGenerator(pool) as client,
        pytest.raises(RolloutError, match=r"request_timeout_s=0.05 s; \d+ requests are pending: problem-"),
    ):
        generate(client, problems(8), 4, sampling(), range(8))
    assert time.monotonic() - started < 10
    # The engine has dropped the abandoned requests and serves on.
    assert len(generate(rollout.client, problems(1), 2, sampling(), [0])) == 1
