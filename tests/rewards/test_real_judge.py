"""Why: an endpoint that this package plays says what we think that servers say. vLLM's own server says what they do.

The embedded model is the judge. It goes on with a sum whose digits have been added up, and ends with `Answer:` and the
last digit, which is the score here. Not covered: other servers, and how good a model's scores are.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
import pytest

from megatron_fipo.assets import resolve_embedded
from megatron_fipo.config.judge import JudgeConfig
from megatron_fipo.engines.server_process import end_processes
from megatron_fipo.export import Request, export
from megatron_fipo.rewards.judge import JudgeError, JudgeRule
from tests.distributed_worker import _free_port

_LONGEST_START_S = 300.0

pytestmark = [pytest.mark.slow, pytest.mark.matrix]  # the server's start takes as much CPU time as forty other tests


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of vLLM's server, on this machine's CPU."""
    place = tmp_path_factory.mktemp("judge")
    model = export(Request(resolve_embedded("embedded:tiny"), place / "model", dtype="float32"))
    port = _free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256"]
    ours = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with (place / "output").open("wb") as output:
        server = subprocess.Popen(
            command, env=os.environ | ours, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        deadline = time.monotonic() + _LONGEST_START_S
        while not _answers(f"http://127.0.0.1:{port}/health"):
            said = (place / "output").read_text(errors="replace")[-4000:]
            assert server.poll() is None and time.monotonic() < deadline, said
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        end_processes([server])


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def rule(url: str, **changes: object) -> JudgeRule:
    settings: dict[str, object] = {
        "url": url,
        "model": "tiny",
        "prompt": "{response}",
        "score_pattern": "Answer: ([0-9])",
        "score_right": 9.0,
        "max_tokens": 40,
    }
    return JudgeRule(JudgeConfig(**settings | changes), 60.0)  # type: ignore[arg-type]


def test_a_real_vllm_judges(url: str) -> None:
    judge = rule(url)
    for response, score in (
        ("1+2+6=?\n1+2=3. 3+6=9. ", 9),
        ("4+3+3=?\n4+3=7. 7+3=0. ", 0),
        ("2+6+5=?\n2+6=8. 8+5=3. ", 3),
    ):
        verdict = judge({"prompt": "", "ground_truth": "", "response": response})
        assert (verdict.accuracy, verdict.extra["judge_score"]) == (score / 9, score), response


def test_what_a_real_vllm_refuses_or_cuts_is_no_verdict(url: str) -> None:
    """The control: what is no score is told apart from a low one."""
    item = {"prompt": "", "ground_truth": "", "response": "1+2+6=?\n1+2=3. 3+6=9. "}
    with pytest.raises(JudgeError, match=r"cut at reward\.judge\.max_tokens=2"):
        rule(url, max_tokens=2)(item)
    with pytest.raises(JudgeError, match="refuses: status 404"):
        rule(url, model="another")(item)
    with pytest.raises(JudgeError, match="no score"):
        rule(url, score_pattern="Score: ([0-9])")(item)
