"""Where the ranks' store listens: on the address they meet at, and on no other interface.

Why: it takes writes from anyone who reaches it. The sockets of a real process are read. Not covered: several machines
(tests/slurm runs ranks on two nodes), and torchrun's own agent store.
"""

import os
import socket
import subprocess
import sys

import psutil
import pytest

from megatron_fipo.errors import FipoError
from megatron_fipo.launch.local import launch
from megatron_fipo.policy.rendezvous import meeting_point

RANK = """
import os
from megatron_fipo.policy import platform
platform.start_process_group(60)
import psutil, torch
total = torch.ones(1)
torch.distributed.all_reduce(total)
if os.environ["RANK"] == "0":
    listening = [c.laddr.ip for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN]
    with open("found", "w") as found:
        found.write(" ".join([str(int(total)), *sorted(set(listening))]))
torch.distributed.barrier()
platform.stop_process_group()
"""


@pytest.mark.slow
def test_a_run_on_one_machine_listens_on_loopback_alone(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert launch(2, tmp_path, [sys.executable, "-c", RANK]) == 0
    assert (tmp_path / "found").read_text() == "2 127.0.0.1"


@pytest.mark.slow
def test_ranks_of_another_launcher_listen_where_they_meet(tmp_path) -> None:
    """As under srun: no inherited socket, and an address of this machine that is not loopback."""
    mine = [a.address for found in psutil.net_if_addrs().values() for a in found if a.family.name == "AF_INET"]
    address = next((address for address in mine if not address.startswith("127.")), None)
    if address is None:
        pytest.skip("this machine has no address but loopback")
    environment = os.environ | {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": address, "MASTER_PORT": "0"}
    subprocess.run([sys.executable, "-c", RANK], cwd=tmp_path, env=environment, check=True, timeout=120)
    count, *listening = (tmp_path / "found").read_text().split()
    assert count == "1" and "0.0.0.0" not in listening and "::" not in listening and address in listening


def test_a_port_that_is_taken_is_named(monkeypatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": taken.getsockname()[1]}
        for name, value in place.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(FipoError, match=r"cannot meet at 127\.0\.0\.1:\d+: .*set MASTER_ADDR and MASTER_PORT"):
            meeting_point(1)
