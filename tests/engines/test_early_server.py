"""Why: a server process that waits for its order is there in every run on a CPU. It must not outlive a run that never
gives one, and what it says once it is a server belongs to that server's log.

Does not cover that it samples: every end-to-end run's first server is one.
"""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from megatron_fipo.config import RolloutConfig
from megatron_fipo.config.checks_machine import has_cuda_driver
from megatron_fipo.engines.early_server import start_early, take_early
from megatron_fipo.engines.server_options import server_arguments, server_environment
from tests.rollout.engines import running, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.skipif(has_cuda_driver(), reason="only servers on a CPU start early")]

REFUSED_RUN = """
import psutil
from megatron_fipo.config import RolloutConfig
from megatron_fipo.engines.early_server import start_early

start_early(RolloutConfig())
print(psutil.Process().children()[0].pid)
"""


def test_it_ends_with_a_run_that_gives_it_no_order() -> None:
    ended = subprocess.run([sys.executable, "-c", REFUSED_RUN], stdout=subprocess.PIPE, text=True, check=True)
    pid = int(ended.stdout)
    wait_until(lambda: not (psutil.pid_exists(pid) and running(psutil.Process(pid))), 30, "its end")


def test_what_it_says_as_a_server_is_in_the_log(tmp_path: Path) -> None:
    config, log, model = RolloutConfig(), tmp_path / "log", tmp_path / "no model"
    model.mkdir()
    start_early(config)
    command = ["--host", "127.0.0.1", "--port", "0", *server_arguments(config, model, seed=0)]
    environment = server_environment(config, None) | {"FIPO_ROLLOUT_TOKEN": "secret"}
    process = take_early(command, environment, log)
    assert process is not None
    assert process.wait(timeout=120) == 1
    assert str(model) in log.read_text()
    assert take_early(command, environment, log) is None, "there was one"
