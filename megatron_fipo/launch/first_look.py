"""Check what can be checked before a run's processes start: the data's first rows, and the import of a reward.

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
from contextlib import contextmanager
from pathlib import Path

from megatron_fipo.config import Config, RewardConfig, resolved
from megatron_fipo.config.configure import refusals_in_one_line
from megatron_fipo.config.loop import own_rule
from megatron_fipo.data.rows import look_at_first_rows
from megatron_fipo.errors import RewardError, RunFailed
from megatron_fipo.processes.ending import die_with_parent
from megatron_fipo.processes.reasons import Listener
from megatron_fipo.rewards.process import VerifierHung, VerifierProcess

LONGEST_IMPORT_S = 5.0
"""Time limit for importing a reward's module here. If the import takes longer, the verifiers check it later."""


def splits_read(config: Config) -> tuple[str, ...]:
    """Return the splits of the problems that a training run reads."""
    return ("train", "validation") if config.validation.every else ("train",)


def look_first(config: Config, splits: tuple[str, ...]) -> None:
    """Refuse data and a reward that a run could not use, and download data from the hub, before processes start.

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
    with _imported(config.reward):
        look_at_first_rows(config.data, splits)


@contextmanager
def _imported(config: RewardConfig) -> Iterator[None]:
    """Import the user's own reward, as a verifier does, while the block runs. Raises ConfigError or RewardError."""
    if own_rule(config.rule) is None:
        yield
        return
    verifier = VerifierProcess(config)
    with ThreadPoolExecutor(1) as threads:
        started = threads.submit(verifier.ensure_started, LONGEST_IMPORT_S)
        try:
            yield
            started.result()
        except RewardError as error:
            if not isinstance(error.__cause__, VerifierHung):
                raise
        finally:
            verifier.retire()


if __name__ == "__main__":
    main()
