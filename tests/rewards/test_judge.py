"""Why: an endpoint that is busy, slow, broken or evasive must cost time or a verdict, never make an answer wrong.

A server of this file plays these parts. Not covered: a real model as the judge, and how good its scores are.
"""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.config import RewardConfig
from megatron_fipo.config.judge import JudgeConfig
from megatron_fipo.errors import ConfigError
from megatron_fipo.records.problem import Problem, prompt_ids
from megatron_fipo.records.sample import Group, sample_from_lists
from megatron_fipo.rewards import judge as judging
from megatron_fipo.rewards.judge import JudgeError, JudgeRule
from megatron_fipo.rewards.pool import RewardPool

ITEM = {"prompt": "3+4=?", "response": "It is {prompt} 7.", "ground_truth": "7"}


def chat(text: Any, end: str = "stop") -> tuple[int, str]:
    return 200, json.dumps({"choices": [{"message": {"content": text}, "finish_reason": end}]})


@dataclass
class Endpoint:
    """Answers each request with the next of its answers, and for ever with the last."""

    answers: list[Any]
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    url: str = ""


@contextmanager
def endpoint(*answers: Any) -> Iterator[Endpoint]:
    plays = Endpoint(list(answers))

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            plays.requests.append({"path": self.path, **json.loads(body)})
            plays.headers.append({name.lower(): value for name, value in self.headers.items()})
            status, text = plays.answers.pop(0) if len(plays.answers) > 1 else plays.answers[0]
            if status == "hang":
                time.sleep(3)
                return
            if status == "slow header":
                for piece in text:
                    self.wfile.write(piece.encode())
                    time.sleep(0.2)
                return
            self.send_response(status)
            self.end_headers()
            for piece in text if isinstance(text, list) else [text]:
                self.wfile.write(piece.encode())
                self.wfile.flush()
                time.sleep(0.2 if isinstance(text, list) else 0)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.block_on_close = True, False
    plays.url = f"http://127.0.0.1:{server.server_port}/v1/"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield plays
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "_FIRST_WAIT_S", 0.01)


def rule(plays: Endpoint, timeout_s: float = 20.0, **settings: Any) -> JudgeRule:
    return JudgeRule(JudgeConfig(url=plays.url, model="m", **settings), timeout_s)


def test_the_last_score_is_the_accuracy_and_the_prompt_is_filled_once() -> None:
    with endpoint(chat("Score: 3? No. Score: 7.5")) as plays:
        verdict = rule(plays, prompt="{prompt}|{response}|{ground_truth}|{other}")(ITEM)
    assert verdict.accuracy == 0.75 and verdict.extra == {"judge_score": 7.5, "judge_cached": 0.0}
    assert plays.requests[0]["path"] == "/v1/chat/completions"
    assert plays.requests[0]["messages"] == [{"role": "user", "content": "3+4=?|It is {prompt} 7.|7|{other}"}]
    for text in ("**Score:** 8", "**Score: 8**", "Score:\n**8**"):
        with endpoint(chat(text)) as plays:
            assert rule(plays)(ITEM).accuracy == 0.8
    with endpoint(chat("grade 1")) as plays:
        assert rule(plays, score_pattern="grade ([1-6])", score_wrong=6, score_right=1)(ITEM).accuracy == 1.0


@pytest.mark.parametrize("trouble", [(429, "slow down"), (503, "starting"), (500, "")])
def test_what_passes_is_tried_again(trouble: tuple[int, str]) -> None:
    with endpoint(trouble, trouble, chat("Score: 10")) as plays:
        assert rule(plays)(ITEM).accuracy == 1.0
        assert len(plays.requests) == 3
    with endpoint(trouble) as plays:
        with pytest.raises(JudgeError, match=f"after 2 attempts: status {trouble[0]}"):
            rule(plays, attempts=2)(ITEM)
        assert len(plays.requests) == 2


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((401, "no such key"), "refuses: status 401, 'no such key'"),
        ((200, "<html>"), "no chat completion: '<html>'"),
        (chat(None), "has no text"),
        (chat("I would rather not."), "no score that .*; it ends 'I would rather not.'"),
        (chat("Score: 1", "length"), "was cut at reward.judge.max_tokens=512; it ends 'Score: 1'"),
        ((200, '{"choices": ["Score: 1"]}'), "no chat completion"),
        (chat("Score: 11"), "score 11 is not from 0 to 10"),
        (chat("Score: -1"), "score -1 is not from 0 to 10"),
    ],
)
def test_no_score_is_an_error_at_once(answer: Any, message: str, tmp_path: Path) -> None:
    with endpoint(answer) as plays:
        with pytest.raises(JudgeError, match=message):
            rule(plays, cache=str(tmp_path))(ITEM)
        assert len(plays.requests) == 1 and list(tmp_path.iterdir()) == [], "and it is not remembered"


@pytest.mark.parametrize("answer", [("hang", ""), (200, ["{"] * 50), ("slow header", "HTTP/1.1 200 OK and so on" * 2)])
def test_a_reply_has_a_deadline_as_a_whole(answer: Any) -> None:
    """Also one that comes a byte at a time, for which a client's own limit starts again with each byte."""
    with endpoint(answer) as plays:
        begin = time.monotonic()
        with pytest.raises(JudgeError, match="after 2 attempts: ReadTimeout"):
            rule(plays, attempts=2, request_timeout_s=0.5)(ITEM)
        assert time.monotonic() - begin < 10, "1 s, and what a busy machine adds"
        with pytest.raises(JudgeError, match="after 1 attempts"):
            rule(plays, timeout_s=1.0, attempts=9)(ITEM)


def test_replies_are_cached_by_what_was_asked(tmp_path: Path) -> None:
    with endpoint(chat("Score: 10"), chat("Score: 0")) as plays:
        first, again = (rule(plays, cache=str(tmp_path / "cache"))(ITEM) for _ in range(2))
        assert (first.accuracy, again.accuracy, again.extra["judge_cached"]) == (1.0, 1.0, 1.0)
        assert len(plays.requests) == 1
        assert rule(plays, cache=str(tmp_path / "cache"), temperature=0.5)(ITEM).accuracy == 0.0, "another request"
        for file in (tmp_path / "cache").glob("*/*.json"):
            file.write_text("{")
        assert rule(plays, cache=str(tmp_path / "cache"))(ITEM).accuracy == 0.0, "a broken file is asked again"


def test_a_keys_line_end_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubernetes' secrets often have one; a header cannot, and httpx quotes it with the key in its error."""
    monkeypatch.setenv("JUDGE_KEY", "secret-1\n")
    with endpoint(chat("Score: 10")) as plays:
        assert rule(plays, key_variable="JUDGE_KEY")(ITEM).accuracy == 1.0
    assert plays.headers[0]["authorization"] == "Bearer secret-1"


@pytest.mark.parametrize("key", ["secret\n-1", "secret-ü", "secret\x7f", "\n"])
def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("JUDGE_KEY", key)
    with pytest.raises(ConfigError, match=r"^reward\.judge\.key_variable: JUDGE_KEY is empty, or has") as caught:
        JudgeRule(JudgeConfig(url="http://judge/v1", model="m", key_variable="JUDGE_KEY"), 20)
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


def group(*responses: str) -> Group:
    samples = tuple(sample_from_lists([1], [0.0], "stop", 0) for _ in responses)
    return Group(Problem("p", "4+5+8=?\n", prompt_ids([2]), "7", "sums"), samples).with_texts(list(responses))


@pytest.mark.slow
def test_the_key_reaches_the_endpoint_and_failures_are_no_wrong_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the real judge processes, which get the key by the environment and not by their command line."""
    monkeypatch.setenv("JUDGE_KEY", "secret-1")
    with endpoint(chat("Score: 10"), chat("Score: 0"), (403, "no")) as plays:
        settings = JudgeConfig(url=plays.url, model="m", key_variable="JUDGE_KEY", request_timeout_s=10)
        with RewardPool(RewardConfig(rule="judge", judge=settings, workers=1, timeout_s=30), 100) as pool:
            results = pool.submit(group("a", "b", "c")).result().results
        assert {headers["authorization"] for headers in plays.headers} == {"Bearer secret-1"}
    assert [result.outcome for result in results] == ["judged", "judged", "crash"]
    assert [result.reward for result in results[:2]] == [1.0, -1.0] and not results[2].was_judged
