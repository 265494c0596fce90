"""Why: a model that is rewarded for what its programs print will write programs that do anything else, too.

Each escape is tried in every sandbox that this machine can have, and again without one where that does no harm: the
control shows that the program does what the test says. Not covered: holes in the kernel; System V shared memory, which
no limit of a process counts.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from megatron_fipo.config.code import CodeConfig
from megatron_fipo.errors import ConfigError
from megatron_fipo.rewards.code import runner
from megatron_fipo.rewards.code import sandbox as sandboxes
from megatron_fipo.rewards.code.sandbox import Result, Sandbox, SandboxError, find_sandbox

pytestmark = pytest.mark.slow

KINDS = ("bubblewrap", "namespaces")
Run = Callable[..., Result]


def limits(kind: str, **changes: object) -> CodeConfig:
    # Much, since other tests run beside these; what is to end by its time gets less.
    settings: dict[str, object] = {"sandbox": kind, "cpu_s": 20.0, "total_s": 300.0}
    return CodeConfig(**settings | changes)  # type: ignore[arg-type]


def found(kind: str, **changes: object) -> Sandbox:
    try:
        return find_sandbox(limits(kind, **changes))
    except ConfigError as error:
        pytest.skip(f"no sandbox {kind} on this machine: {error.problem}")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def once(kind: str, program: str, given: str = "", **changes: object) -> Result:
    (result,) = found(kind, **changes).run(program, None, (given,))
    return result


def attempt(expression: str) -> str:
    """A program that prints whether something was possible."""
    return f"try:\n    {expression}\n    print('done')\nexcept OSError as error:\n    print('refused')\n"


def test_programs_and_calls_run_test_by_test(kind: str) -> None:
    sandbox = found(kind)
    results = list(sandbox.run("print(2 * int(input()))", None, ("1", "x", "3")))
    assert results == [Result("exit 0", "2\n"), Result("exit 1", ""), Result("exit 0", "6\n")]
    call = "class Solution:\n    def add(self, a, b):\n        print('noise')\n        return (a + b,)\n"
    assert [each.output for each in sandbox.run(call, "add", ([1, 2], [3, 4]))] == ["[3]", "[7]"]
    assert [each.end for each in sandbox.run("def add(a): return {1}", "add", ([1],))] == ["exit 1"]
    thread = "import threading\nthreading.Thread(target=lambda: print('late')).start()"
    assert [each.output for each in sandbox.run(thread, None, ("",))] == ["late\n"]


def test_files_of_the_machine_are_not_there(kind: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    for path in ("/etc/shadow", "/etc/passwd", str(Path.home()), str(secret), "/proc/1/environ", "/sys/kernel"):
        listing = f"import os; os.stat({path!r})"
        assert once(kind, attempt(listing)).output == "refused\n", path
    assert once("none", attempt(f"import os; os.stat({str(secret)!r})")).output == "done\n"


def test_only_a_small_scratch_place_can_be_written(kind: str, tmp_path: Path) -> None:
    for path in ("/usr/x", "/usr/lib/x", "/x", "/dev/x", "/etc/x", str(tmp_path / "x"), sys.base_prefix + "/x"):
        assert once(kind, attempt(f"open({path!r}, 'w')")).output == "refused\n", path
    assert once(kind, attempt("open('/tmp/x', 'w').write('x')")).output == "done\n"
    many = "for n in range(9): open(f'/tmp/{n}', 'w').write('x' * 500_000)"
    assert once(kind, attempt(many), scratch_mib=1).output == "refused\n"
    assert once(kind, attempt(many), scratch_mib=16).output == "done\n"
    assert once("none", attempt(f"open({str(tmp_path / 'x')!r}, 'w')")).output == "done\n"


def test_what_one_response_writes_the_next_does_not_find(kind: str) -> None:
    sandbox = found(kind)
    (written,) = sandbox.run("open('/tmp/x', 'w'); print('written')", None, ("",))
    (read,) = sandbox.run(attempt("open('/tmp/x')"), None, ("",))
    assert (written.output, read.output) == ("written\n", "refused\n")


def test_there_is_no_network(kind: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        connect = f"import socket; socket.create_connection({address}, 1).close()"
        assert once(kind, attempt(connect)).output == "refused\n"
        assert once("none", attempt(connect)).output == "done\n"


def test_there_are_no_secrets_and_no_rights(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIPO_SECRET", "hidden")
    assert "FIPO" not in once(kind, "import os; print(dict(os.environ))").output
    mount = (
        "import ctypes; libc = ctypes.CDLL(None, use_errno=True)\n"
        "print(libc.mount(b'x', b'/tmp', b'tmpfs', 0, None), libc.umount2(b'/usr', 2), libc.unshare(0x10000000))"
    )
    assert once(kind, mount).output.startswith("-1 -1 ")


NAMESPACE = (
    "import ctypes; libc = ctypes.CDLL(None)\n"
    "print(libc.unshare(0x10000000), libc.unshare(0x20000), libc.mount(b'x', b'/tmp', b'tmpfs', 0, b'size=8g'))"
)
CLONE = (
    f"import ctypes; print(ctypes.CDLL(None).syscall({runner._CLONE.get(os.uname().machine)}, 0x10000011, 0, 0, 0, 0))"
)
NO_FILTER = ("        _filter_calls()\n", "")


def without(sandbox: Sandbox, kept: str, put: str) -> Sandbox:
    """The same sandbox with another text in its runner."""
    *start, text = sandbox.command
    assert text.count(kept) == 1
    return Sandbox((*start, text.replace(kept, put)), sandbox.limits)


def namespaces_can_be_closed(kind: str) -> bool:
    tries = {
        "bubblewrap": ["bwrap", "--unshare-user", "--disable-userns", "--ro-bind", "/", "/", "true"],
        "namespaces": ["unshare", "--map-root-user", "sh", "-c", "echo 0 > /proc/sys/user/max_user_namespaces"],
    }
    return subprocess.run(tries[kind], capture_output=True).returncode == 0


def test_a_program_gets_no_namespace_of_its_own(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why: there it had all capabilities, and could mount memory that no limit counts.

    The kernel's setting and the runner's filter are each tried alone, since a machine may have only one of them.
    """
    closed = found(kind)
    assert once(kind, NAMESPACE).output == "-1 -1 -1\n"
    if namespaces_can_be_closed(kind):
        (result,) = without(closed, *NO_FILTER).run(NAMESPACE, None, ("",))
        assert result.output == "-1 -1 -1\n"
    monkeypatch.setattr(sandboxes, "_NO_NAMESPACES", ())
    monkeypatch.setattr(sandboxes, "_SETUP", sandboxes._SETUP.replace("{ echo 0 >", "{ echo 9 >"))
    opened = found(kind)
    assert next(opened.run(NAMESPACE, None, ("",))).output == "-1 -1 -1\n"
    assert next(opened.run(CLONE, None, ("",))).output == "-1\n"
    unfiltered = without(opened, *NO_FILTER)
    assert next(unfiltered.run(NAMESPACE, None, ("",))).output == "0 0 0\n", "the control"
    assert "-1" not in next(unfiltered.run(CLONE, None, ("",))).output, "the control"


def test_a_program_cannot_starve_its_judge(kind: str) -> None:
    """Why: the kernel lets it limit a process of the same user, and a runner without descriptors is a failed check."""
    starve = "import resource; resource.prlimit(1, resource.RLIMIT_NOFILE, (3, 3))"
    idle = "import os; os.sched_setscheduler(1, os.SCHED_IDLE, os.sched_param(0))"
    pinned = "import os; os.sched_setaffinity(1, {0})"
    itself = "import os, resource; resource.prlimit(0, resource.RLIMIT_NOFILE); os.sched_setaffinity(0, {0})"
    by_number = "import os, resource; resource.prlimit(os.getpid(), resource.RLIMIT_NOFILE); os.nice(1)"
    slower = ("import os; os.setpriority(os.PRIO_PROCESS, 1, 19)", "import os; os.setpriority(os.PRIO_USER, 0, 19)")
    for program in (starve, idle, pinned, *slower):
        results = found(kind).run(attempt(program), None, ("", ""))
        assert [each.output for each in results] == ["refused\n"] * 2, program
    assert [once(kind, attempt(each)).output for each in (itself, by_number)] == ["done\n"] * 2
    open_judge = without(found(kind), *NO_FILTER)
    for program in (idle, pinned):
        assert next(open_judge.run(attempt(program), None, ("",))).output == "done\n", "the control"
    with pytest.raises(SandboxError):
        list(open_judge.run(attempt(starve), None, ("", "")))


def test_a_fork_bomb_is_bounded_and_ends(kind: str) -> None:
    before = len(psutil.pids())
    bomb = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass\n"
    assert once(kind, bomb, cpu_s=1.0).end in ("time", "CPU time")
    count = (
        "import os, time\nn = 0\ntry:\n    while n < 40:\n        if os.fork() == 0:\n            time.sleep(5)\n"
        "            os._exit(0)\n        n += 1\nexcept OSError:\n    pass\nprint(n)\n"
    )
    assert int(once(kind, count).output) < 8
    assert int(once(kind, count, processes=64).output) == 40, "the control: the limit is what stops it"
    assert len(psutil.pids()) < before + 30


def test_memory_output_and_time_have_limits(kind: str) -> None:
    allocate = "x = bytearray(200 << 20); print(len(x))"
    assert once(kind, allocate, memory_mib=128).end == "exit 1"
    assert once(kind, allocate, memory_mib=512).end == "exit 0"
    assert once(kind, "while True: print('x' * 1000)", output_kib=64).end == "output"
    assert once(kind, "while True: pass", cpu_s=1.0).end in ("CPU time", "time")
    assert once(kind, "import time; time.sleep(60)", cpu_s=1.0).end == "time"
    long = found(kind, cpu_s=1.0, total_s=2.0).run("import time; time.sleep(60)", None, ("", "", ""))
    assert [each.end for each in long] == ["time", "total time", "total time"]


def test_what_a_test_leaves_behind_is_gone_before_the_next(kind: str) -> None:
    program = (
        "import os, time\nif input() == 'leave':\n    if os.fork() == 0:\n        os.setsid()\n"
        "        for second in range(80):\n            open('/tmp/alive', 'w').write(str(second)); time.sleep(0.1)\n"
        "        os._exit(0)\n    time.sleep(0.5)\n    print('left')\n"
        "else:\n    before = open('/tmp/alive').read(); time.sleep(0.5); print(open('/tmp/alive').read() == before)\n"
    )
    left, looked = found(kind).run(program, None, ("leave", "look"))
    assert (left.output, looked.output) == ("left\n", "True\n")


def test_a_program_cannot_end_or_read_its_judge(kind: str) -> None:
    program = (
        "import os, signal, ctypes\nfor number in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGSTOP):\n"
        "    os.kill(1, number)\nprint(ctypes.CDLL(None).ptrace(16, 1, 0, 0))\n"
    )
    assert list(found(kind).run(program, None, ("", ""))) == [Result("exit 0", "-1\n")] * 2


def test_everything_ends_with_a_killed_parent(kind: str) -> None:
    found(kind)
    script = (
        "from megatron_fipo.config.code import CodeConfig\n"
        "from megatron_fipo.rewards.code.sandbox import find_sandbox\n"
        f"sandbox = find_sandbox(CodeConfig(sandbox={kind!r}, cpu_s=100, total_s=300))\n"
        "program = 'import os, time\\nos.fork() or os.setsid()\\nwhile True: time.sleep(0.1)'\n"
        "print('ready', flush=True)\n"
        "list(sandbox.run(program, None, ('',)))\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == "ready\n"
        deadline = time.monotonic() + 20
        while len(inside := psutil.Process(parent.pid).children(recursive=True)) < 4:
            assert time.monotonic() < deadline, "the program did not start"
            time.sleep(0.05)
        parent.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(inside, timeout=10)
    assert [each for each in alive if each.status() != psutil.STATUS_ZOMBIE] == []


def test_a_sandbox_that_fails_is_no_result(kind: str) -> None:
    sandbox = found(kind)
    broken = Sandbox(("sh", "-c", "echo not allowed >&2; exit 1"), sandbox.limits)
    with pytest.raises(SandboxError, match="the sandbox did not start: not allowed"):
        list(broken.run("print(1)", None, ("",)))
    ends = Sandbox(("sh", "-c", "echo '{\"ready\": true}'"), sandbox.limits)
    with pytest.raises(SandboxError, match="ended before the program's tests did"):
        list(ends.run("print(1)", None, ("",)))


def test_a_machine_without_sandboxes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sandboxes._ENVIRONMENT, "PATH", str(tmp_path))
    for kind in (*KINDS, "auto"):
        with pytest.raises(ConfigError, match=r"^reward\.code\.sandbox: .* \(apt-get install bubblewrap") as raised:
            find_sandbox(limits(kind))
        assert "\n" not in str(raised.value)
    monkeypatch.undo()
    assert once("none", "print(1)") == Result("exit 0", "1\n"), "a key says so"
    assert os.path.exists(sandboxes._interpreter())
