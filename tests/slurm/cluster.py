"""A real Slurm of several nodes on one machine, without systemd: each node has its own network namespace and name.

A launch that only works on localhost fails here, as it would on a cluster. GPUs are links to /dev/null, so that a job
may ask for eight; two more nodes, of four each, are a partition of their own. Needs root, and Debian's slurmctld,
slurmd, slurm-client, munge and iproute2.
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "ip", "nsenter", "unshare")
PACKAGES = "slurmctld slurmd slurm-client munge iproute2"
_SUBNET, _BRIDGE, _GPUS = "10.213.0", "fipo-slurm", 8
SMALL, _SMALL_NODES, _SMALL_GPUS = "small", 2, 4
"""The partition of nodes with four GPUs, as many as GH200, GB200 and many A100 nodes have."""
_PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"
_HOSTS, _MARK = Path("/etc/hosts"), "# fipo-slurm"


def missing() -> str | None:
    """Return why no cluster can be started here, or None."""
    absent = [tool for tool in TOOLS if shutil.which(tool, path=_PATH) is None]
    if absent:
        return f"Slurm is not installed ({', '.join(absent)}): apt-get install {PACKAGES}"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if subprocess.run(["ip", "netns", "add", "fipo-probe"], capture_output=True, env=_environment()).returncode != 0:
        return "network namespaces cannot be made here"
    subprocess.run(["ip", "netns", "del", "fipo-probe"], env=_environment())
    return None


def _environment() -> dict[str, str]:
    return os.environ | {"PATH": _PATH}


class Cluster:
    """Nodes node1, node2, …; a context manager, which stops everything and takes the network down."""

    def __init__(self, nodes: int):
        self.names = [f"node{number}" for number in range(1, nodes + _SMALL_NODES + 1)]
        self._large, self._small = self.names[:nodes], self.names[nodes:]
        # One place, where what a killed test left is found; not pytest's, since a socket's path is short.
        self.directory = Path(tempfile.gettempdir(), "fipo-slurm")
        self.environment = _environment() | {"SLURM_CONF": str(self.directory / "slurm.conf")}
        self._pid_files = [f"slurmd.{name}.pid" for name in self.names] + ["slurmctld.pid", "munged.pid"]

    def __enter__(self) -> "Cluster":
        self._take_down()
        try:
            self._write_configuration()
            self._network_up()
            self._start()
            states = ("sinfo", "-h", "-N", "-p", f"all,{SMALL}", "-o", "%T")
            wait_until(lambda: self.run(*states).split() == ["idle"] * len(self.names), 60, self.log)
        except BaseException:
            self._take_down()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._take_down()

    def _take_down(self) -> None:
        if (self.directory / "slurmctld.pid").exists():
            with contextlib.suppress(subprocess.SubprocessError, AssertionError):
                for job in self.run("squeue", "-h", "-o", "%A").split():
                    self.run("scancel", job)
                wait_until(lambda: not self.run("squeue", "-h"), 20)
        for name in self._pid_files:
            self._stop_daemon(self.directory / name)
        for name in self.names:
            subprocess.run(["ip", "netns", "del", f"fipo-{name}"], capture_output=True, env=self.environment)
        subprocess.run(["ip", "link", "del", _BRIDGE], capture_output=True, env=self.environment)
        # Rewritten in place: the file is often a mount, which cannot be renamed over.
        lines = _HOSTS.read_text().splitlines(keepends=True)
        _HOSTS.write_text("".join(line for line in lines if _MARK not in line))
        shutil.rmtree(self.directory, ignore_errors=True)

    def run(self, *command: str, timeout_s: float = 30, **options: Any) -> str:
        """Output of a command that has to succeed, such as squeue."""
        ended = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=timeout_s, check=False, **options
        )
        if ended.returncode != 0:
            raise subprocess.SubprocessError(f"{' '.join(command)}: {ended.stderr}")
        return ended.stdout

    def log(self) -> str:
        """The end of the controller's log."""
        return "\n".join((self.directory / "slurmctld.log").read_text(errors="replace").splitlines()[-20:])

    def _write_configuration(self) -> None:
        directory = self.directory
        directory.mkdir()
        (directory / "state").mkdir(mode=0o700)
        for index in range(_GPUS):
            (directory / f"gpu{index}").symlink_to("/dev/null")
        (directory / "gres.conf").write_text(
            f"NodeName={','.join(self._large)} Name=gpu File={directory}/gpu[0-{_GPUS - 1}]\n"
            f"NodeName={','.join(self._small)} Name=gpu Type=a100 File={directory}/gpu[0-{_SMALL_GPUS - 1}]\n"
        )
        # Named outright, since autodetection fails where cgroups are not mounted.
        (directory / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        key = directory / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={name} NodeAddr={_SUBNET}.{101 + index} Port=16801 CPUs=64 "
            f"RealMemory=64000 State=UNKNOWN "
            + (f"Gres=gpu:a100:{_SMALL_GPUS}" if name in self._small else f"Gres=gpu:{_GPUS}")
            for index, name in enumerate(self.names)
        )
        (directory / "slurm.conf").write_text(
            f"""ClusterName=fipo
SlurmctldHost=ctl({_SUBNET}.1)
SlurmctldPort=16800
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={directory}/munge.sock
StateSaveLocation={directory}/state
SlurmctldPidFile={directory}/slurmctld.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdSpoolDir={directory}/spool.%n
SlurmdPidFile={directory}/slurmd.%n.pid
SlurmdLogFile={directory}/slurmd.%n.log
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=bf_interval=2,sched_interval=5
SlurmdParameters=config_overrides
ReturnToService=0
KillWait=5
JobRequeue=1
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
{nodes}
PartitionName=all Nodes={",".join(self._large)} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=300
PartitionName={SMALL} Nodes={",".join(self._small)} MaxTime=INFINITE State=UP
PartitionName=urgent Nodes={",".join(self._large)} MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
        )

    def _network_up(self) -> None:
        def ip(*arguments: str) -> None:
            self.run("ip", *arguments)

        ip("link", "add", _BRIDGE, "type", "bridge")
        ip("addr", "add", f"{_SUBNET}.1/24", "dev", _BRIDGE)
        ip("link", "set", _BRIDGE, "up")
        hosts = [f"{_SUBNET}.1 ctl {_MARK}\n"]
        for index, name in enumerate(self.names):
            space = f"fipo-{name}"
            ip("netns", "add", space)
            ip("link", "add", f"fipo{index}", "type", "veth", "peer", "name", "eth0", "netns", space)
            ip("link", "set", f"fipo{index}", "master", _BRIDGE, "up")
            ip("-n", space, "link", "set", "lo", "up")
            ip("-n", space, "addr", "add", f"{_SUBNET}.{101 + index}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "eth0", "up")
            hosts.append(f"{_SUBNET}.{101 + index} {name} {_MARK}\n")
        with _HOSTS.open("a") as file:
            file.writelines(hosts)

    def _start(self) -> None:
        directory = self.directory
        files = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "munged.pid", "log-file": "munged.log"}
        self.run(
            "munged", *(f"--{name}={directory / file}" for name, file in files.items()), f"--seed-file={directory}/seed"
        )
        named = 'hostname "$1"; shift; exec "$@"'
        configuration = self.environment["SLURM_CONF"]
        self.run("unshare", "--uts", "sh", "-c", named, "sh", "ctl", "slurmctld", "-f", configuration)
        for name in self.names:
            (directory / f"spool.{name}").mkdir()
            # nsenter, since "ip netns exec" mounts another /sys, which has no cgroups.
            inside = ["nsenter", f"--net=/run/netns/fipo-{name}", "unshare", "--uts", "sh", "-c", named, "sh", name]
            self.run(*inside, "slurmd", "-N", name, "-f", configuration)

    def _stop_daemon(self, pid_file: Path) -> None:
        if not pid_file.exists():
            return
        pid = int(pid_file.read_text())
        command = Path(f"/proc/{pid}/cmdline")
        if not command.exists() or str(self.directory) not in command.read_text():
            return  # the number is somebody else's by now
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        with contextlib.suppress(AssertionError):
            wait_until(lambda: not Path(f"/proc/{pid}").exists(), 10)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def wait_until(condition: Callable[[], Any], timeout_s: float, tell: Callable[[], str] = lambda: "") -> None:
    """Poll a condition, with a deadline. `tell` describes the state if the deadline passes."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s\n{tell()}"
        time.sleep(0.3)
