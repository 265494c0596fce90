"""Why: a training run owns its servers. None may outlive it, and one that fails has to say why, in bounded time,
and to be replaced.

Real servers and real signals. Does not cover servers on other machines: there the scheduler ends them.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from megatron_fipo.engines import watch as watch_module
from megatron_fipo.engines.access import TOKEN_VARIABLE
from megatron_fipo.engines.pool import EnginePool
from megatron_fipo.engines.server_log import ServerLog
from megatron_fipo.engines.server_process import shared_files
from megatron_fipo.engines.states import Server
from megatron_fipo.errors import RolloutError
from megatron_fipo.records.sample import Group, Partial, Sample
from megatron_fipo.rollout.generator import EngineGenerator
from megatron_fipo.rollout.requests import Requests
from tests.engines.tokens import token_of
from tests.rollout.conftest import Rollout
from tests.rollout.engines import (
    MAX_PROMPT,
    MAX_RESPONSE,
    generate,
    log_prob_error,
    problems,
    rollout_config,
    running,
    sampling,
    save_tiny_model,
    wait_until,
)

# A trainer that starts a server, says when it is ready, and then is busy.
TRAINER = """
import sys, time
from pathlib import Path
from megatron_fipo.engines.pool import EnginePool
from tests.rollout.engines import rollout_config

with EnginePool(rollout_config(tensor_parallel=2), Path(sys.argv[1]), Path(sys.argv[2]), seed=0) as pool:
    pool.start()
    print("started", flush=True)
    pool.wait_ready()
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


@pytest.mark.matrix  # test_killed_and_resumed kills a whole run
@pytest.mark.slow
def test_nothing_is_left_when_the_trainer_is_killed(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model", seed=0)
    trainer = _trainer(tmp_path)
    _says(trainer, "started")
    _says(trainer, "ready")
    family = psutil.Process(trainer.pid).children(recursive=True)
    # The API server, its engine core, two workers: all are running before, or the test would prove nothing.
    assert len([process for process in family if running(process)]) >= 4
    # What CPU workers of one engine share is named by vLLM alone, and stays where they are all killed at once.
    segments = {path for path in shared_files(family) if not path.name.startswith("vllm_dist_")}
    assert segments
    trainer.kill()
    trainer.wait()
    wait_until(lambda: not any(map(running, family)), 10, f"the end of {family}")
    wait_until(lambda: not any(path.exists() for path in segments), 10, f"the removal of {segments}")


@pytest.mark.matrix  # tests/launch has Ctrl-C at every moment
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
    with EnginePool(rollout_config(), tmp_path / "model", tmp_path / "run", seed=0) as pool:
        pool.start()
        with pytest.raises(RolloutError, match=r"(?s)ended with exit code 1; .*config\.json"):
            pool.wait_ready()


@pytest.mark.slow
def test_a_server_that_is_slow_to_start_is_named_with_its_log(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model", seed=0)
    config = rollout_config(start_timeout_s=1.0)
    with EnginePool(config, tmp_path / "model", tmp_path / "run", seed=0) as pool:
        pool.start()
        started = time.monotonic()
        with pytest.raises(RolloutError, match=r"not ready within rollout.start_timeout_s=1 s .*rollout-0.log"):
            pool.wait_ready()
        assert time.monotonic() - started < 20


@pytest.mark.slow
def test_adopting_a_server_needs_its_token_and_its_layout(rollout: Rollout, monkeypatch: pytest.MonkeyPatch) -> None:
    url = rollout.pool.servers[0].url
    token = token_of(rollout.pool)
    nowhere = Path("nowhere")

    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with pytest.raises(RolloutError, match=TOKEN_VARIABLE):
        EnginePool(rollout_config(addresses=[url]), nowhere, nowhere, seed=0)

    monkeypatch.setenv(TOKEN_VARIABLE, "wrong")
    with pytest.raises(RolloutError, match="refused the token"):
        EnginePool(rollout_config(addresses=[url]), nowhere, nowhere, seed=0).wait_ready()

    monkeypatch.setenv(TOKEN_VARIABLE, token)
    wider = rollout_config(addresses=[url], tensor_parallel=2)
    with pytest.raises(RolloutError, match=r"has 1 workers, but rollout.tensor_parallel is 2"):
        EnginePool(wider, nowhere, nowhere, seed=0).wait_ready()

    with EnginePool(rollout_config(addresses=[url]), nowhere, nowhere, seed=0) as adopted:
        adopted.start()
        adopted.wait_ready()
        with EngineGenerator(adopted) as client:
            assert len(generate(client, problems(1), 2, sampling(), [0])[0].samples) == 2
    # Closing it leaves somebody else's server alone.
    assert rollout.pool.servers[0].failure() is None
    assert len(generate(rollout.client, problems(1), 2, sampling(), [0])) == 1


@pytest.mark.slow
def test_what_a_hanging_server_leaves_undone_is_sampled_again_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its second loss in a row is more than the one restart that is allowed."""
    monkeypatch.setattr(watch_module, "WATCH_EVERY_S", 0.5)
    save_tiny_model(tmp_path / "model", seed=0)
    config = rollout_config(max_restarts=1, hang_timeout_s=5.0)
    warnings: list[str] = []
    with EnginePool(config, tmp_path / "model", tmp_path / "run", seed=0, warn=warnings.append) as pool:
        pool.start()
        pool.wait_ready()
        asked, seeds = problems(64), range(64)
        with EngineGenerator(pool) as client:
            undisturbed = generate(client, asked, 8, sampling(), seeds)
            family = _family(pool.servers[0])
            arrived: list[str] = []

            def stop_the_workers(group: Group) -> None:
                arrived.append(group.problem.id)
                for process in family[1:]:
                    if running(process):
                        process.suspend()

            groups = generate(client, asked, 8, sampling(), seeds, on_group=stop_the_workers, supply=pool.admit)
            assert sorted(arrived) == sorted(problem.id for problem in asked), "a group was lost or came twice"
            tokens = [[sample.token_ids.tolist() for sample in group.samples] for group in groups]
            assert tokens == [[sample.token_ids.tolist() for sample in group.samples] for group in undisturbed]
            assert not any(map(running, family)), "what hung is gone"
            assert "hang_timeout_s=5 s" in warnings[0] and "restart 1 of at most 1" in warnings[0]
            assert warnings[1].endswith("is back in service")

            server = pool.servers[0].process
            assert server is not None
            started = time.monotonic()
            with pytest.raises(
                RolloutError, match=r"(?s)max_restarts=1 restarts .*signal 9; the end of .*rollout-0.log"
            ):
                generate(
                    client,
                    asked,
                    8,
                    sampling(),
                    seeds,
                    on_group=lambda _: os.kill(server.pid, signal.SIGKILL),
                    supply=pool.admit,
                )
            assert time.monotonic() - started < 30


@pytest.fixture
def node(tmp_path: Path, rollout: Rollout) -> Iterator[psutil.Process]:
    """A rollout node of a job, without Slurm, with one server like that of `rollout`; its address is in tmp_path."""
    save_tiny_model(tmp_path / "model", seed=0)
    overrides = {"model.path": tmp_path / "model", "run.directory": tmp_path / "run", "cluster.gpus_per_node": 1}
    overrides |= {f"rollout.{key}": getattr(rollout.pool.config, key) for key in ("dtype", "enforce_eager")}
    overrides |= {"rollout.max_prompt_length": MAX_PROMPT, "rollout.max_response_length": MAX_RESPONSE}
    token = token_of(rollout.pool)
    with (tmp_path / "node.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "megatron_fipo.launch.rollout_node", *(f"{k}={v}" for k, v in overrides.items())],
            env=os.environ
            | {"SLURMD_NODENAME": "localhost", "SLURM_JOB_NUM_NODES": "1"}
            | {"FIPO_ADDRESSES": str(tmp_path), TOKEN_VARIABLE: token},
            cwd=Path(__file__).parents[2],
            stdout=log,
            stderr=log,
        )
    try:
        address = tmp_path / "localhost"
        wait_until(lambda: address.exists() or process.poll() is not None, 300, "the node's server")
        assert address.exists(), (tmp_path / "node.log").read_text()[-4000:]
        yield psutil.Process(process.pid)
    finally:
        family = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        assert process.wait(timeout=60) == 128 + signal.SIGTERM, (tmp_path / "node.log").read_text()[-4000:]
        assert not any(map(running, family))


@pytest.mark.matrix  # test_two_engines.py and test_train.py adopt servers
@pytest.mark.slow
def test_servers_of_others_are_left_out_and_taken_back(
    rollout: Rollout, node: psutil.Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two hangs for a while, and dies and is started again by its node; the other serves all along.

    It goes on with what the first has sent in parts: a token's log-prob is then that of all tokens before it. Responses
    are long, since this process may read what a server has sent long after that.
    """
    monkeypatch.setattr(watch_module, "WATCH_EVERY_S", 0.5)
    monkeypatch.setenv(TOKEN_VARIABLE, token_of(rollout.pool))
    steady, fragile = rollout.pool.servers[0].url, (tmp_path / "localhost").read_text()
    config = rollout_config(addresses=[fragile, steady], hang_timeout_s=5.0, stream_tokens=4)
    adopted = EnginePool(config, Path("nowhere"), Path("nowhere"), seed=0)
    adopted.wait_ready()
    asked = problems(32)
    family = node.children(recursive=True)
    samples_of = Requests.samples

    def in_service_after(signum: int) -> list[str]:
        parts: list[int] = []

        async def with_a_signal(
            requests: Requests, server: Server, *more: Any
        ) -> AsyncGenerator[tuple[int, Sample | Partial], None]:
            async for index, sample in samples_of(requests, server, *more):
                yield index, sample
                parts.extend([index] * (isinstance(sample, Partial) and server.url == fragile))
                if len(parts) == 1:  # at the beginning of its first response
                    for process in filter(running, family):
                        process.send_signal(signum)

        monkeypatch.setattr(Requests, "samples", with_a_signal)
        with EngineGenerator(adopted) as client:
            groups = generate(client, asked, 8, sampling(max_tokens=160), range(32))
            assert [group.problem.id for group in groups] == [problem.id for problem in asked]
            assert client.retries > 0 and client.continued > 0
        for group in groups[::4]:
            for sample in group.samples:
                assert log_prob_error(rollout.model, group.problem.token_ids, sample) < 1e-4
        return [server.url for server in adopted.serving]

    assert in_service_after(signal.SIGSTOP) == [steady]
    for process in family:
        process.resume()
    assert _admits(adopted) == ([fragile, steady], True), "the planes have to be joined anew"
    assert _admits(adopted) == ([fragile, steady], False), "the control: nothing has changed"
    # What a server says that was started again between two steps: it answers, but is in no plane.
    label = {"new_version": "default"}
    url = f"{fragile}/update_weight_version"
    assert httpx.post(url, json=label, headers=adopted.headers, timeout=30, trust_env=False).is_success
    assert _admits(adopted) == ([fragile, steady], True)

    assert in_service_after(signal.SIGKILL) == [steady]
    assert _admits(adopted) == ([steady], False)
    assert adopted.end_step() == {"rollout_restarts": 0.0, "rollout_servers": 1.0}
    wait_until(lambda: _admits(adopted)[0] == [fragile, steady], 300, "its node to start it again")


def _admits(pool: EnginePool) -> tuple[list[str], bool]:
    """The servers in service after `admit`, and whether it has changed the roster."""
    before = pool.roster
    pool.admit()
    return [server.url for server in pool.in_service], pool.roster != before


def _family(server: Server) -> list[psutil.Process]:
    """The API server's process and all that it started."""
    assert server.process is not None
    root = psutil.Process(server.process.pid)
    return [root, *root.children(recursive=True)]


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
