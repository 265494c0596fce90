"""No orphans among vLLM's processes, however the one above them ends (SIGKILL included). Linux only."""

import os

from megatron_fipo.processes.ending import die_with_parent


def bind_descendants() -> None:
    """Makes every process forked from this one, and from those, die with its parent."""
    os.register_at_fork(after_in_child=die_with_parent)
