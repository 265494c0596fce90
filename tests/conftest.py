"""What holds for every test: one compute thread, no network, GPU tests skipped where there is no GPU."""

import os
import signal
from pathlib import PurePath
from typing import Any

import hypothesis
import psutil
import pytest

# Set before any test imports torch, and inherited by every process that a test starts. Two ranks on two cores are
# slower with two threads each, and compiling costs more than it gives in a test.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

# A test run in the background ignores Ctrl-C, one under nohup the end of its terminal, and every process that a test
# starts would inherit that.
for stop, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(stop) is signal.SIG_IGN:
        signal.signal(stop, usual)


# An example may take any time on a machine that has other work.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")

SHARED_BY_A_FOLDER = ("tests/rollout", "tests/slurm")
"""Folders whose tests share a server or a cluster, and so a process of `make test`; others are dealt by file."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Deal tests to the processes of `make test` by what they share."""
    from xdist.scheduler import LoadScopeScheduling

    class BySharing(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            folder = str(PurePath(file).parent)
            return folder if folder in SHARED_BY_A_FOLDER else file

        def remove_node(self, node: Any) -> str | None:
            """Forget what a lost process had finished: xdist would deal it out again, and wait for it for ever."""
            units = self.assigned_work.get(node, {})
            for scope in [scope for scope, unit in units.items() if all(unit.values())]:
                del units[scope]
            return super().remove_node(node)

    return BySharing(config, log)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object | None) -> None:
    """Say how a process of `make test` was lost, where xdist only says that it was."""
    if error:
        process, available = node.gateway._io.popen, psutil.virtual_memory().available >> 20
        print(f"\n{node.gateway.id} ended with status {process.wait(10)}; {available} MiB of memory are available")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    # Imported here, because most single tests need no torch and start faster without.
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))
