"""A run's checkpoints, as its loop sees them: begun after a step, and put in their place when they are written.

Every method is called by every rank together.
"""

from contextlib import ExitStack
from pathlib import Path

from megatron_fipo import loop_state
from megatron_fipo.config import Config
from megatron_fipo.errors import CheckpointError
from megatron_fipo.policy import checkpoint, huggingface_directories
from megatron_fipo.policy.saving import Saving
from megatron_fipo.policy.update import Policy
from megatron_fipo.runs.leader import Leader
from megatron_fipo.tracking.console import Console
from megatron_fipo.weights.ranks import only_rank_0


class RunCheckpoints:
    """Writes checkpoints into a run's directory."""

    def __init__(
        self,
        config: Config,
        policy: Policy,
        model_dir: Path,
        directory: Path,
        step: int,
        leader: Leader | None,
        console: Console,
        stack: ExitStack,
    ):
        """Nothing is written yet.

        Args:
            directory: the run's.
            step: the run's last step that a checkpoint has; 0 if none has one.
            leader: given on rank 0.
            stack: its end gives up a checkpoint that is being written; the last complete one stays.
        """
        self.saved_step = step
        """The last step that a checkpoint has."""
        self._config, self._policy, self._model_dir, self._directory = config, policy, model_dir, directory
        self._leader, self._console = leader, console
        self._saving: Saving | None = None
        stack.callback(lambda: self._saving.abandon() if self._saving else None)

    def save(self, step: int, seconds: float, results: dict[str, float | None], *, with_huggingface: bool) -> None:
        """Begin a checkpoint of the policy and of the loop; complete when `settle` says so, or at once.

        Args:
            step: training steps done.
            seconds: of training so far.
            results: of validations so far.
            with_huggingface: write the policy beside it as a Hugging Face directory too.
        """
        self.settle()
        self._check_lock()
        snapshot = only_rank_0(lambda: self._leader.rollouts.snapshot() if self._leader else None)
        with self._console.phase("checkpoint"):
            try:
                self._saving = checkpoint.start_saving(
                    self._policy,
                    self._directory / "checkpoints",
                    step,
                    loop_state.content(step, seconds, results),
                    self._config.checkpoint.keep,
                    self._model_dir,
                    lambda place: self._write_rollout(snapshot, place),
                )
            except CheckpointError as error:
                self._not_saved(error)
                return
            if with_huggingface:
                self._save_huggingface(self._saving.target)
        if not self._config.checkpoint.asynchronous:
            self.settle()

    def settle(self, *, wait: bool = True) -> None:
        """Put the checkpoint that is being written in its place, if there is one: now, or if that is no wait."""
        saving = self._saving
        if saving is None:
            return
        with self._console.phase("checkpoint"):
            if not wait and not saving.is_written():
                return
            self._saving = None
            self._check_lock()
            try:
                saved = saving.finish()
            except CheckpointError as error:
                self._not_saved(error)
                return
            self.saved_step = checkpoint.step_of(saved)
            settings = self._config.checkpoint
            if self._leader is not None and settings.keep and settings.huggingface_every:
                huggingface_directories.prune(self._directory / "huggingface", saved)

    def _write_rollout(self, snapshot: int | None, place: Path) -> None:
        """Write what is sampled, in a process of rank 0 that writes the checkpoint's small files."""
        assert self._leader is not None and snapshot is not None, "rank 0 has both"
        self._leader.rollouts.write_snapshot(snapshot, str(place))

    def _save_huggingface(self, saved: Path) -> None:
        """Write the policy beside its checkpoint as a Hugging Face directory."""
        directory = self._directory / "huggingface"
        if failure := huggingface_directories.save(self._policy, saved, directory, self._model_dir):
            # The run has lost nothing: the same weights are in the checkpoint.
            remedy = f"megatron-fipo export {saved} DIRECTORY makes it of the checkpoint"
            self._console.warn(f"step {checkpoint.step_of(saved)}: no Hugging Face directory: {failure} ({remedy})")

    def _not_saved(self, error: CheckpointError) -> None:
        """Do what `checkpoint.on_error` says of a checkpoint that could not be written."""
        if self._config.checkpoint.on_error == "stop":
            raise error
        self._console.warn(f"{error}; the run goes on without it, as checkpoint.on_error=warn says")

    def _check_lock(self) -> None:
        if self._leader is not None:
            self._leader.check_lock()
