"""Check what can be checked before a run's processes start: the data's first rows, and the import of the user's code.

This runs in its own process. Otherwise the libraries that read tables and call the hub would stay in the launcher's
memory for the whole run, and their threads would receive the signals that the launcher waits for.

    python -m megatron_fipo.launch.first_look CONFIGURATION SPLIT...
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from megatron_fipo.config import Config, resolved
from megatron_fipo.config.configure import refusals_in_one_line
from megatron_fipo.config.loop import reads_columns
from megatron_fipo.data.rows import look_at_first_rows
from megatron_fipo.environments.pool import environment_process
from megatron_fipo.errors import RunFailed
from megatron_fipo.processes.ending import die_with_parent
from megatron_fipo.processes.reasons import Listener
from megatron_fipo.processes.worker_process import WorkerHung, WorkerProcess
from megatron_fipo.rewards.process import verifier_process

LONGEST_IMPORT_S = 5.0
"""Time limit for importing a module of the user's here. If it takes longer, the run's processes check it later."""


def splits_read(config: Config) -> tuple[str, ...]:
    """Return the splits of the problems that a training run reads."""
    return ("train", "validation") if config.validation.every else ("train",)


def look_first(config: Config, splits: tuple[str, ...]) -> None:
    """Refuse data and user code that a run could not use, and download data from the hub, before processes start.

    Raises:
        FipoError: the error with which the run would end; names the file, the row and the column, or the function.
    """
    with tempfile.TemporaryDirectory(prefix="megatron_fipo-look-") as place, Listener() as listener:
        file = Path(place) / "config.yaml"
        resolved.write(file, config)
        launcher = os.getpid()
        ended = subprocess.run(
            [sys.executable, "-m", "megatron_fipo.launch.first_look", str(file), *splits],
            env=os.environ | listener.environment(),
            pass_fds=[listener.descriptor],
            stdin=subprocess.DEVNULL,
            preexec_fn=lambda: die_with_parent(launcher),
        )
        told = listener.heard()
    if ended.returncode and told is not None:
        raise RunFailed(told.text, told.exit_code)


def main() -> None:
    """Run as the process that checks."""
    with refusals_in_one_line():
        look_here(resolved.read(Path(sys.argv[1])), tuple(sys.argv[2:]))


def look_here(config: Config, splits: tuple[str, ...]) -> None:
    """Do the checks of `look_first` in this process."""
    with ExitStack() as beside:
        if reads_columns(config.reward.rule):
            beside.enter_context(_imported(verifier_process(config.reward)))
        if config.environment.is_own:
            beside.enter_context(_imported(environment_process(config.environment, None, 0)))
        look_at_first_rows(config.data, splits)


@contextmanager
def _imported(worker: WorkerProcess) -> Iterator[None]:
    """Import the user's own code, as a run's worker does, while the block runs. Raises FipoError, as a run would."""
    with ThreadPoolExecutor(1) as threads:
        started = threads.submit(worker.ensure_started, LONGEST_IMPORT_S)
        try:
            yield
            started.result()
        except worker.job.error as error:
            if not isinstance(error.__cause__, WorkerHung):
                raise
        finally:
            worker.retire()


if __name__ == "__main__":
    main()
