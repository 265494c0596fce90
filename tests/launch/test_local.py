"""The one-machine launcher with small scripts as ranks: however the run ends, no process is left, and the reason shows.

Each test runs the launcher in a separate process, since it changes signal masks and adopts orphans. Not covered: ranks
that use torch.distributed (tests of the trainer), and a process that survives SIGKILL.
"""

import os
import signal
import time

import pytest

from megatron_fipo.launch.local import adopt_environment, already_launched
from tests.launch.launched import Launched, is_running

starts_processes = pytest.mark.slow


@pytest.fixture
def start(tmp_path):
    running = []

    def start_launcher(world_size: int, script: str, grace_s: float = 10.0) -> Launched:
        running.append(Launched(tmp_path, world_size, script, grace_s))
        return running[-1]

    yield start_launcher
    for launched in running:
        for pid in [launched.process.pid, *launched.alive()]:
            if is_running(pid):
                os.kill(pid, signal.SIGKILL)
        launched.process.wait()


@starts_processes
def test_all_ranks_run_and_only_rank_0_writes_to_the_terminal(start, tmp_path):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS")
    status, output, errors = start(2, f"print(*(os.environ[name] for name in {names}))").finish()
    assert (status, output, errors) == (0, "0 0 2 127.0.0.1 1\n", "")
    assert (tmp_path / "logs" / "rank-1.log").read_text() == "1 1 2 127.0.0.1 1\n"
    assert not (tmp_path / "logs" / "rank-0.log").exists()


@starts_processes
def test_a_failing_rank_ends_the_others_and_its_log_is_shown(start):
    launched = start(
        3,
        """
started()
if rank == 2:
    while not all((directory / f"pid-{other}").exists() for other in range(3)): time.sleep(0.01)
    print("the reason")
    sys.exit(7)
time.sleep(60)
""",
    )
    status, _, errors = launched.finish()
    assert status == 7
    assert "rank 2 of 3 failed first (exit status 7)" in errors
    assert "the reason" in errors
    assert len(launched.pids()) == 3 and launched.alive() == []


@starts_processes
def test_of_two_failures_the_first_is_named(start):
    """Rank 0 fails because rank 1 did, as a collective does when its peer is gone."""
    script = """
if rank == 1:
    started()
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGSEGV)
while not (directory / "pid-1").exists(): time.sleep(0.001)
pid = int((directory / "pid-1").read_text())
while Path(f"/proc/{pid}/stat").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text(): time.sleep(0.001)
os._exit(1)
"""
    status, _, errors = start(2, script).finish()
    assert "rank 1 of 2 failed first (killed by SIGSEGV)" in errors
    assert status == 128 + signal.SIGSEGV


@starts_processes
def test_a_run_that_was_asked_to_stop_is_no_failure_and_ends_in_peace(start, tmp_path):
    """The ranks end one after the other. The last one, which is still closing its servers, receives no SIGTERM."""
    script = """
started()
if rank == 0:
    time.sleep(1)
    (directory / "clean").write_text("done")
sys.exit(75)
"""
    status, _, errors = start(2, script).finish()
    assert status == 75
    assert errors.startswith("launch: stopped; this command resumes the run:\n  ")
    assert errors.endswith(f"run.directory={tmp_path}\n") and errors.count("\n") == 2
    assert (tmp_path / "clean").exists()


@starts_processes
def test_a_failure_while_stopping_is_a_failure(start):
    script = """
if rank == 0: sys.exit(75)
time.sleep(0.2)
sys.exit(9)
"""
    status, _, errors = start(2, script).finish()
    assert status == 9 and "rank 1 of 2 failed first (exit status 9)" in errors


@starts_processes
def test_a_rank_that_ignores_sigterm_is_killed_after_the_grace_time(start):
    script = """
if rank == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    started()
    time.sleep(60)
while not (directory / "pid-0").exists(): time.sleep(0.01)
sys.exit(3)
"""
    launched = start(2, script, grace_s=0.5)
    status, _, errors = launched.finish()
    assert status == 3
    assert "rank 0: still running 0.5 s after it was asked to stop" in errors
    assert launched.alive() == []


@starts_processes
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_signal_reaches_each_rank_once_and_lets_it_clean_up(start, tmp_path, signum):
    script = """
from megatron_fipo.processes.ending import terminate_on_sigterm
terminate_on_sigterm()
try:
    started()
    time.sleep(60)
finally:
    time.sleep(0.2)
    (directory / f"clean-{rank}").write_text("done")
"""
    launched = start(2, script)
    launched.wait_until_started()
    launched.process.send_signal(signum)
    status, _, errors = launched.finish()
    assert status == 128 + signum
    assert f"stopping on {signum.name}" in errors and "Traceback" not in errors
    assert sorted(file.name for file in tmp_path.glob("clean-*")) == ["clean-0", "clean-1"]
    assert launched.alive() == []


@starts_processes
def test_a_second_ctrl_c_kills_at_once(start):
    script = """
signal.signal(signal.SIGINT, lambda *_: (directory / f"asked-{rank}").write_text("once"))
started()
while True: time.sleep(0.1)
"""
    launched = start(2, script, grace_s=60.0)
    launched.wait_until_started()
    launched.process.send_signal(signal.SIGINT)
    launched.wait_for(lambda: len(list(launched.directory.glob("asked-*"))) == 1)  # rank 0 tells the others
    time.sleep(0.6)
    before = time.monotonic()
    launched.process.send_signal(signal.SIGINT)
    status, _, errors = launched.finish()
    assert time.monotonic() - before < 5
    assert status == 130 and "killed on a second Ctrl-C" in errors
    assert launched.alive() == []


@starts_processes
def test_after_a_ctrl_c_the_ranks_end_by_themselves_and_what_goes_on_is_shown(start, tmp_path):
    """Rank 0 takes longer to save than the grace time after SIGTERM. It tells the other rank itself."""
    script = """
signal.signal(signal.SIGINT, lambda *_: (directory / f"asked-{rank}").write_text("once"))
started()
while not (directory / "asked-0").exists(): time.sleep(0.01)
time.sleep(1.5)
sys.exit(75)
"""
    launched = start(2, script, grace_s=0.5)
    launched.wait_until_started()
    launched.process.send_signal(signal.SIGINT)
    status, _, errors = launched.finish()
    assert status == 130 and not (tmp_path / "asked-1").exists()
    assert "this command resumes the run:\n  " in errors and "still running" not in errors


@starts_processes
def test_a_rank_that_fails_while_it_saves_is_a_failure(start):
    script = """
signal.signal(signal.SIGINT, lambda *_: sys.exit(9))
started()
time.sleep(60)
"""
    launched = start(2, script)
    launched.wait_until_started()
    launched.process.send_signal(signal.SIGINT)
    status, _, errors = launched.finish()
    assert status == 9 and "rank 0 of 2 failed first (exit status 9)" in errors and launched.alive() == []


REFUSAL = """
from megatron_fipo.config.configure import refusals_in_one_line
from megatron_fipo.errors import FipoError, RefusedOnRank0
with refusals_in_one_line():
    raise FipoError("the reason") if rank == 0 else RefusedOnRank0("the reason", 1)
"""


@starts_processes
@pytest.mark.parametrize("world_size", [1, 4])
def test_a_refusal_is_one_line_from_one_process(start, tmp_path, world_size):
    """This does not depend on which rank ends first."""
    status, output, errors = start(world_size, REFUSAL).finish()
    assert (status, output, errors) == (1, "", "error: the reason\n")
    assert all(not log.read_text() for log in (tmp_path / "logs").glob("*.log"))


@starts_processes
def test_a_rank_that_fails_because_another_has_given_up_is_not_shown(start):
    """Rank 0 has reported the reason, and is still closing its servers when rank 1 fails because of it."""
    script = """
from megatron_fipo.config.configure import refusals_in_one_line
from megatron_fipo.errors import FipoError
from megatron_fipo.processes.reasons import told_at_once
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if rank == 1:
    while not (directory / "told").exists(): time.sleep(0.01)
    sys.exit("lost the connection")
with refusals_in_one_line():
    try:
        with told_at_once():
            raise FipoError("the reason")
    finally:
        (directory / "told").touch()
        time.sleep(1)
"""
    status, _, errors = start(2, script).finish()
    assert (status, errors) == (1, "error: the reason\n")


@starts_processes
def test_a_rank_that_fails_without_a_reason_is_shown_beside_the_reason_of_another(start):
    """The failure of rank 0 may only be a consequence of that of rank 1."""
    script = """
if rank == 1:
    while not (directory / "pid-0").exists(): time.sleep(0.01)
    print("the cause")
    started()
    sys.exit(3)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
started()
while not (directory / "pid-1").exists(): time.sleep(0.01)
time.sleep(1)
from megatron_fipo.config.configure import refusals_in_one_line
from megatron_fipo.errors import FipoError
with refusals_in_one_line():
    raise FipoError("what follows")
"""
    status, _, errors = start(2, script).finish()
    assert status == 1 and "rank 1 of 2 failed first (exit status 3)" in errors
    assert "the cause" in errors and errors.endswith("error: what follows\n")


@starts_processes
def test_a_launcher_that_was_suspended_goes_on(start):
    """As by Ctrl-Z and fg. Python's sigtimedwait returns a signal that there is not when its time is over by then."""
    launched = start(1, "started(); time.sleep(4)")
    launched.wait_until_started()
    for _ in range(2):
        launched.process.send_signal(signal.SIGSTOP)
        time.sleep(1.1)
        launched.process.send_signal(signal.SIGCONT)
        time.sleep(0.3)
    assert launched.finish() == (0, "", "")


@starts_processes
def test_killing_the_launcher_leaves_no_rank(start):
    launched = start(3, "started(); time.sleep(60)")
    launched.wait_until_started()
    assert len(launched.alive()) == 3  # the control: they do live while the launcher does
    launched.process.kill()
    launched.wait_for(lambda: launched.alive() == [])


@starts_processes
def test_what_a_crashed_rank_started_is_found_and_killed(start):
    """After a segmentation fault of rank 0, its vLLM servers are orphans in their own sessions."""
    script = """
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
(directory / "pid-child").write_text(str(child.pid))
os._exit(5)
"""
    launched = start(1, script)
    status, _, errors = launched.finish()
    assert status == 5 and "rank 0 of 1 failed first (exit status 5); its output is above" in errors
    assert len(launched.pids()) == 1 and launched.alive() == []


@starts_processes
def test_the_tail_starts_at_this_launch(start, tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank-1.log").write_text("from the run before\n")
    _, _, errors = start(2, "sys.exit('now' if rank == 1 else 0)").finish()
    assert "now" in errors and "before" not in errors
    assert (tmp_path / "logs" / "rank-1.log").read_text() == "from the run before\nnow\n"


def test_who_launched_a_process(monkeypatch):
    for name in [name for name in os.environ if name.startswith("SLURM") or name in ("RANK", "WORLD_SIZE")]:
        monkeypatch.delenv(name)
    assert not already_launched()
    # A batch script's own environment: one process, which must start the ranks or call srun.
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert not already_launched()
    for name, value in {
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_JOB_ID": "17",
        "SLURM_STEP_NODELIST": "gpu[01-02]",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
        "SLURM_NODEID": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert already_launched()
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    adopt_environment()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    assert [os.environ[name] for name in names] == ["3", "4", "1", "2", "gpu01", "12527"]
    # Under torchrun inside a job step, torchrun's variables stay.
    monkeypatch.setenv("RANK", "0")
    adopt_environment()
    assert os.environ["RANK"] == "0"
