"""Why: a training run owns its servers. None may outlive it, and one that fails has to say why, in bounded time.

Real servers and real signals. Does not cover servers on other machines: there the scheduler ends them.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_fipo.errors import RolloutError
from megatron_fipo.rollout.access import TOKEN_VARIABLE
from megatron_fipo.rollout.client import RolloutClient
from megatron_fipo.rollout.server_log import ServerLog
from megatron_fipo.rollout.service import RolloutService, _shared_files
from tests.rollout.conftest import Rollout
from tests.rollout.engines import problems, rollout_config, running, sampling, save_tiny_model, wait_until

# A trainer that starts a server, says when it is ready, and then is busy.
TRAINER = """
import sys, time
from pathlib import Path
from megatron_fipo.rollout.service import RolloutService, _shared_files
from tests.rollout.engines import rollout_config

with RolloutService(rollout_config(), Path(sys.argv[1]), Path(sys.argv[2]), seed=0) as service:
    service.start()
    print("started", flush=True)
    service.wait_ready()
    print("ready", flush=True)
    time.sleep(600)
"""


def _trainer(directory: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(directory / "model"), str(directory / "run")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def _says(trainer: subprocess.Popen[str], word: str) -> None:
    assert trainer.stdout is not None
    assert trainer.stdout.readline().strip() == word


@pytest.mark.slow
def test_nothing_is_left_when_the_trainer_is_killed(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model", seed=0)
    trainer = _trainer(tmp_path)
    _says(trainer, "started")
    _says(trainer, "ready")
    family = psutil.Process(trainer.pid).children(recursive=True)
    # The API server, its engine core, a worker: all are running before, or the test would prove nothing.
    assert len([process for process in family if running(process)]) >= 3
    segments = _shared_files(family)
    assert segments
    trainer.kill()
    trainer.wait()
    wait_until(lambda: not any(map(running, family)), 10, f"the end of {family}")
    wait_until(lambda: not any(path.exists() for path in segments), 10, f"the removal of {segments}")


@pytest.mark.slow
def test_nothing_is_left_after_ctrl_c_while_a_server_starts(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model", seed=0)
    trainer = _trainer(tmp_path)
    _says(trainer, "started")
    root = psutil.Process(trainer.pid)
    # The server and its engine core, which is in the middle of its imports.
    wait_until(lambda: len(root.children(recursive=True)) >= 2, 120, "the engine core")
    family = root.children(recursive=True)
    trainer.send_signal(signal.SIGINT)
    assert trainer.wait(timeout=60) != 0
    assert not any(map(running, family))


@pytest.mark.slow
def test_a_server_that_cannot_start_is_quoted(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with RolloutService(rollout_config(), tmp_path / "model", tmp_path / "run", seed=0) as service:
        service.start()
        with pytest.raises(RolloutError, match=r"(?s)ended with exit code 1; .*config\.json"):
            service.wait_ready()


@pytest.mark.slow
def test_a_server_that_is_slow_to_start_is_named_with_its_log(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model", seed=0)
    config = rollout_config(start_timeout_s=1.0)
    with RolloutService(config, tmp_path / "model", tmp_path / "run", seed=0) as service:
        service.start()
        started = time.monotonic()
        with pytest.raises(RolloutError, match=r"not ready within rollout.start_timeout_s=1 s .*rollout-0.log"):
            service.wait_ready()
        assert time.monotonic() - started < 5


@pytest.mark.slow
def test_adopting_a_server_needs_its_token_and_its_layout(rollout: Rollout, monkeypatch: pytest.MonkeyPatch) -> None:
    url = rollout.service.servers[0].url
    token = rollout.service.headers["Authorization"].removeprefix("Bearer ")
    nowhere = Path("nowhere")

    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with pytest.raises(RolloutError, match=TOKEN_VARIABLE):
        RolloutService(rollout_config(addresses=[url]), nowhere, nowhere, seed=0)

    monkeypatch.setenv(TOKEN_VARIABLE, "wrong")
    with pytest.raises(RolloutError, match="refused the token"):
        RolloutService(rollout_config(addresses=[url]), nowhere, nowhere, seed=0).wait_ready()

    monkeypatch.setenv(TOKEN_VARIABLE, token)
    wider = rollout_config(addresses=[url], tensor_parallel=2)
    with pytest.raises(RolloutError, match=r"has 1 workers, but rollout.tensor_parallel is 2"):
        RolloutService(wider, nowhere, nowhere, seed=0).wait_ready()

    with RolloutService(rollout_config(addresses=[url]), nowhere, nowhere, seed=0) as adopted:
        adopted.start()
        adopted.wait_ready()
        with RolloutClient(adopted) as client:
            assert len(client.generate(problems(1), 2, sampling(), [0])[0].responses) == 2
    # Closing it leaves somebody else's server alone.
    rollout.service.check()
    assert len(rollout.client.generate(problems(1), 2, sampling(), [0])) == 1


@pytest.mark.slow
def test_a_server_that_dies_while_it_samples_is_quoted_at_once(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model", seed=0)
    with RolloutService(rollout_config(), tmp_path / "model", tmp_path / "run", seed=0) as service:
        service.start()
        service.wait_ready()
        server = service.servers[0].process
        assert server is not None
        with RolloutClient(service) as client:
            started = time.monotonic()
            with pytest.raises(RolloutError, match=r"(?s)was ended by signal 9; the end of .*rollout-0.log"):
                client.generate(
                    problems(64), 8, sampling(), range(64), on_group=lambda _: os.kill(server.pid, signal.SIGKILL)
                )
            assert time.monotonic() - started < 30


def test_a_log_shows_the_first_error_and_only_this_servers_lines(tmp_path: Path) -> None:
    path = tmp_path / "rollout-0.log"
    path.write_text("(Worker) ERROR [old.py:1] OldError: of the run before\n")
    log = ServerLog(path)
    with path.open("a") as file:
        file.write("INFO starting\n(Worker pid=1) ERROR 1-1 [exec.py:3] RuntimeError: the cause\n")
        file.write("(APIServer pid=2) ERROR 1-1 [core.py:3] vllm.EngineDeadError: see above\n")
        file.write("".join(f' - leaked function "{index}"\n' for index in range(50)))
    excerpt = log.excerpt()
    assert excerpt.startswith("its first error: RuntimeError: the cause; the end of")
    assert "INFO starting" in excerpt and "EngineDeadError" in excerpt
    assert "leaked" not in excerpt and "OldError" not in excerpt
