"""Sandboxes for programs that a model wrote: bubblewrap, or namespaces by util-linux's unshare, around `runner.py`.

A program has a user, network, process, mount, IPC and host name of its own: no network, of files only a read-only /usr
and a small /tmp, no capability. Root first becomes nobody, since the kernel does not count root's processes. The whole
namespace ends with its first process, and that ends with the verifier.
"""

import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_fipo.config.code import SANDBOX_START_S, CodeConfig
from megatron_fipo.errors import ConfigError
from megatron_fipo.processes.ending import die_with_parent
from megatron_fipo.rewards.code import runner

_NOBODY = 65534
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8"}
_NO_NAMESPACES = ("--unshare-user", "--disable-userns")
"""Of bubblewrap 0.8 and later: nothing inside makes a user namespace, in which it would have every capability."""
_TRIAL_S = 20.0
"""Least time that the trial of a sandbox has at the start of a run, whatever programs get."""
_LONGEST_LINE_FACTOR = 6
"""JSON may take this many bytes for one of a text."""
# Mounts an empty root with read-only places in it, goes there for good, and drops every capability. umount finds what
# is mounted by /proc, which programs do not get: it would show them other processes where it is not masked. A container
# may have /proc/sys read-only; then only the runner's filter keeps programs from user namespaces.
_SETUP = """
set -e
root=/tmp
scratch=$1; shift
mount -t tmpfs -o size=1m,mode=755 sandbox "$root"
mkdir "$root/old" "$root/proc" "$root/tmp" "$root/dev"
while [ "$1" != -- ]; do
  if [ -L "$1" ]; then
    ln -s "$(readlink "$1")" "$root$1"
  elif [ -e "$1" ]; then
    mkdir -p "$root$1"
    mount --rbind -o ro "$1" "$root$1"
  fi
  shift
done
shift
for device in null zero urandom; do
  : > "$root/dev/$device"
  mount --bind "/dev/$device" "$root/dev/$device"
done
mount -t tmpfs -o "size=$scratch,mode=1777,nosuid,nodev" sandbox "$root/tmp"
mount --rbind /proc "$root/proc"
cd "$root"
pivot_root . old
cd /
umount -l /old
{ echo 0 > /proc/sys/user/max_user_namespaces; } 2> /dev/null || :
umount -l /proc
rmdir /old /proc
mount -o remount,ro /
cd /tmp
exec setpriv --bounding-set=-all --inh-caps=-all --no-new-privs "$@"
"""


class SandboxError(Exception):
    """The sandbox did not do its part: no verdict on the program."""


@dataclass(frozen=True)
class Result:
    """What came of one test."""

    end: str
    """exit N, signal N, CPU time, time, total time or output."""
    output: str
    """Empty unless it ended by exit 0."""


@dataclass(frozen=True)
class Sandbox:
    """A way to run programs, and their limits."""

    command: tuple[str, ...]
    """What starts the runner, without its text."""
    limits: CodeConfig

    def run(self, program: str, function: str | None, inputs: tuple[Any, ...]) -> Generator[Result, None, None]:
        """The program's results, test by test; closing the iterator ends it. Raises SandboxError."""
        limits = self.limits
        request = {
            "program": program,
            "function": function,
            "inputs": inputs,
            "cpu_s": limits.cpu_s,
            "total_s": limits.total_s,
            "memory_bytes": limits.memory_mib << 20,
            "output_bytes": limits.output_kib << 10,
            "file_bytes": limits.scratch_mib << 20,
            "processes": limits.processes,
        }
        deadline = time.monotonic() + limits.total_s + SANDBOX_START_S
        with _started(self.command) as (process, noted):
            lines = _lines(process, json.dumps(request).encode(), deadline, limits.output_kib << 10)
            if next(lines, None) != {"ready": True}:
                raise SandboxError(f"the sandbox did not start: {_last_line(noted)}")
            for _ in inputs:
                told = next(lines, None)
                if told is None:
                    raise SandboxError("the sandbox ended before the program's tests did")
                yield Result(**told)


def find_sandbox(limits: CodeConfig) -> Sandbox:
    """The sandbox that `reward.code.sandbox` asks for, tried out. Raises ConfigError if there is none.

    The trial has more time than programs may have, since a run starts while the machine is busy with its other parts.
    """
    wanted = limits.sandbox
    if wanted == "auto":
        wanted = "bubblewrap" if shutil.which("bwrap", path=_ENVIRONMENT["PATH"]) else "namespaces"
    sandbox = Sandbox(_command(wanted, limits), limits)
    cpu_s = max(limits.cpu_s, _TRIAL_S / 2)
    patient = replace(limits, cpu_s=cpu_s, total_s=max(limits.total_s, 2 * cpu_s + 1))
    try:
        (result,) = Sandbox(sandbox.command, patient).run("print(input())", None, ("works",))
    except SandboxError as error:
        raise _refusal(f"the sandbox {wanted} does not work here: {error}") from None
    except OSError as error:
        raise _refusal(f"the sandbox {wanted} is not here: {error}") from None
    if result != Result("exit 0", "works\n"):
        raise _refusal(f"the sandbox {wanted} does not run a program that prints a line ({result.end})")
    return sandbox


def _refusal(problem: str) -> ConfigError:
    remedy = (
        "apt-get install bubblewrap, on a machine that allows user namespaces; or reward.code.sandbox=none, with which "
        "the model's programs can read and change your files"
    )
    return ConfigError("reward.code.sandbox", problem, remedy)


def _command(kind: str, limits: CodeConfig) -> tuple[str, ...]:
    python = _interpreter()
    start = (str(python), "-I", "-S", "-c", Path(runner.__file__).read_text(encoding="utf-8"))
    if kind == "none":
        return start
    places = ["/usr", "/bin", "/lib", "/lib64", "/lib32", "/etc/ld.so.cache"]
    if not python.is_relative_to("/usr"):
        places.append(sys.base_prefix)
    as_user: tuple[str, ...] = ("setpriv", "--pdeathsig=KILL")
    if os.geteuid() == 0:
        as_user += (f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups")
    size = str(limits.scratch_mib << 20)
    if kind == "bubblewrap":
        return (*as_user, *_bubblewrap(places, size, as_user), *start)
    apart = ("--user", "--map-root-user", "--net", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child")
    places.remove("/etc/ld.so.cache")  # a file: the loader finds the libraries in their usual places without it
    return (*as_user, "unshare", *apart, "sh", "-c", _SETUP, "sandbox", size, *places, "--", *start)


def _bubblewrap(places: list[str], size: str, as_user: tuple[str, ...]) -> tuple[str, ...]:
    command = ["bwrap", "--unshare-all", "--die-with-parent", "--as-pid-1", "--new-session", "--cap-drop", "ALL"]
    mounts: list[str] = []
    for place in places:
        mounts += ["--symlink", os.readlink(place), place] if os.path.islink(place) else ["--ro-bind-try", place, place]
    if _works((*as_user, "bwrap", *_NO_NAMESPACES, *mounts, "true")):
        command += _NO_NAMESPACES
    command += [*mounts, "--dev", "/dev", "--remount-ro", "/dev", "--size", size, "--tmpfs", "/tmp", "--chdir", "/tmp"]
    return (*command, "--remount-ro", "/")


def _works(command: tuple[str, ...]) -> bool:
    """Whether a command ends well. Raises ConfigError if it does not end, since that says nothing about it."""
    try:
        ended = subprocess.run(
            command, env=_ENVIRONMENT, stdin=subprocess.DEVNULL, capture_output=True, timeout=_TRIAL_S
        )
    except OSError:
        return False  # the trial of the whole sandbox says why
    except subprocess.TimeoutExpired:
        raise _refusal(f"{' '.join(command)} did not end within {_TRIAL_S:.0f} s") from None
    return ended.returncode == 0


def _interpreter() -> Path:
    """The Python behind a virtual environment, whose packages programs do not get."""
    return Path(getattr(sys, "_base_executable", sys.executable)).resolve()


@contextmanager
def _started(command: tuple[str, ...]) -> Iterator[tuple[subprocess.Popen[bytes], Any]]:
    """The process and its standard error; it has ended, with all of its namespace, when the block has."""
    with tempfile.TemporaryFile() as noted:
        process = subprocess.Popen(
            command,
            env=_ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=noted,
            cwd="/",
            preexec_fn=partial(die_with_parent, os.getpid()),
        )
        try:
            yield process, noted
        finally:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()


def _lines(
    process: subprocess.Popen[bytes], request: bytes, deadline: float, longest_output: int
) -> Iterator[dict[str, Any]]:
    """Hand over the request, then yield each line that comes back. Raises SandboxError after the deadline."""
    assert process.stdin is not None and process.stdout is not None
    to, back, received = process.stdin.fileno(), process.stdout.fileno(), b""
    rest = memoryview(request)  # a slice of which is no copy
    os.set_blocking(to, False)
    while True:
        waits_for = [to] if rest else []
        reads, writes, _ = select.select([back], waits_for, [], max(deadline - time.monotonic(), 0))
        if writes:
            try:
                rest = rest[os.write(to, rest[: 1 << 16]) :]
            except BrokenPipeError:
                rest = rest[:0]
            if not rest:
                process.stdin.close()
        if reads:
            piece = os.read(back, 1 << 16)
            if not piece:
                return
            *lines, received = (received + piece).split(b"\n")
            for line in lines:
                yield json.loads(line)
            if len(received) > _LONGEST_LINE_FACTOR * longest_output + 1000:
                raise SandboxError("the sandbox said more than the limit of output")
        if not reads and not writes:
            raise SandboxError("the sandbox gave no answer in time")


def _last_line(noted: Any) -> str:
    noted.seek(0)
    lines = noted.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"
