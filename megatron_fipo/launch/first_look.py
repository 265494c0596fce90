"""What can be found out before a run's processes start: the data's first rows, and whether a reward can be imported.

In a process of its own: the libraries that read tables and ask the hub would stay in the launcher's memory for the
whole run, and their threads would take the signals that it waits for.

    python -m megatron_fipo.launch.first_look CONFIGURATION SPLIT...
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from megatron_fipo.config import Config, RewardConfig, resolved
from megatron_fipo.config.configure import refusals_in_one_line
from megatron_fipo.config.loop import own_rule
from megatron_fipo.data.rows import look_at_first_rows
from megatron_fipo.errors import RewardError, RunFailed
from megatron_fipo.processes.ending import die_with_parent
from megatron_fipo.processes.reasons import Listener
from megatron_fipo.processes.worker_process import WorkerHung
from megatron_fipo.rewards.process import verifier_process

LONGEST_IMPORT_S = 5.0
"""How long a reward's module may take to import here. A longer one is judged when the verifiers have started."""


def splits_read(config: Config) -> tuple[str, ...]:
    """The splits of the problems that a training run reads."""
    return ("train", "validation") if config.validation.every else ("train",)


def look_first(config: Config, splits: tuple[str, ...]) -> None:
    """Refuse data and a reward that a run could not use, and fetch what is on the hub, before there are processes.

    Raises:
        FipoError: what the run would end with; names the file, the row and the column, or the function.
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
    """The process that looks."""
    with refusals_in_one_line():
        look_here(resolved.read(Path(sys.argv[1])), tuple(sys.argv[2:]))


def look_here(config: Config, splits: tuple[str, ...]) -> None:
    """`look_first`, in this process."""
    with _imported(config.reward):
        look_at_first_rows(config.data, splits)


@contextmanager
def _imported(config: RewardConfig) -> Iterator[None]:
    """Import a reward of the user's own beside what is done in here, as a verifier does. ConfigError, RewardError."""
    if own_rule(config.rule) is None:
        yield
        return
    verifier = verifier_process(config)
    with ThreadPoolExecutor(1) as threads:
        started = threads.submit(verifier.ensure_started, LONGEST_IMPORT_S)
        try:
            yield
            started.result()
        except RewardError as error:
            if not isinstance(error.__cause__, WorkerHung):
                raise
        finally:
            verifier.retire()


if __name__ == "__main__":
    main()
