"""Why: 64 servers take more connections than the usual 1,024 open files; a run that lost healthy servers for that, one
after the other, would blame them for it.

Real sockets to made-up servers in a process of their own. Not covered: other processes of the run that run out.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SERVERS = 64


@pytest.fixture(scope="module")
def ports() -> Iterator[list[str]]:
    command = [sys.executable, "-m", "benchmarks.fake_engines", str(SERVERS), "64", "0.02"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        yield process.stdout.readline().split()
        process.stdin.close()
        process.wait(timeout=30)


def client_of(ports: list[str], hard: int, *, provides: bool) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.engines.many_servers", str(hard), "yes" if provides else "no", *ports]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.mark.slow
def test_the_soft_limit_is_raised(ports: list[str]) -> None:
    found = client_of(ports, 4096, provides=True)
    assert (found["groups"], found["serving"], found["warnings"]) == (found["asked"], SERVERS, []), found
    assert found["retries"] == 0


def test_a_hard_limit_that_is_too_low_is_refused_in_one_line(ports: list[str]) -> None:
    found = client_of(ports, 1024, provides=True)
    assert found["groups"] == 0
    assert "64 servers need 15" in found["error"] or "64 servers need 14" in found["error"], found
    assert "the hard limit of ulimit -n is 1024" in found["error"] and "\n" not in found["error"]


@pytest.mark.slow
def test_no_server_is_lost_where_descriptors_run_out_all_the_same(ports: list[str]) -> None:
    """Without the limit raised: requests wait for descriptors. That some did is the control of both."""
    found = client_of(ports, 1024, provides=False)
    assert found["retries"] > 0, "the limit was never reached"
    assert (found["groups"], found["serving"], found["warnings"]) == (found["asked"], SERVERS, []), found
