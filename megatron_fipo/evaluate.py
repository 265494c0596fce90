"""Evaluate a model: `python -m megatron_fipo.evaluate model.path=DIRECTORY data.validation=[FILE]`.

The command starts vLLM servers, samples the validation problems, and judges the responses as training does. It reports
avg@k, cons@k and pass@k with intervals, and lengths, and writes every response. There is no trainer. Neither
Megatron-Core nor torch is imported here, but transformers imports torch for its tokenizers. After a stop, the same
command resumes.
"""

import functools
import os
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from megatron_fipo.config import Config, with_values
from megatron_fipo.config.checks import check_evaluation
from megatron_fipo.config.checks_here import check_here_to_sample
from megatron_fipo.config.configure import run_with_config
from megatron_fipo.config.loop import reads_columns
from megatron_fipo.data.problems import load_problems
from megatron_fipo.data.tokenizers import Tokenizer
from megatron_fipo.engines.pool import EnginePool
from megatron_fipo.errors import ConfigError
from megatron_fipo.evaluation.files import ALL, PROBLEMS_FILE, RESULTS_FILE, SAMPLES_FILE
from megatron_fipo.evaluation.inherited import with_settings_of
from megatron_fipo.evaluation.progress import EvaluationProgress
from megatron_fipo.evaluation.results import summarise, table
from megatron_fipo.evaluation.sample_file import SampledProblem, SampleFile
from megatron_fipo.evaluation.served import check_served
from megatron_fipo.evaluation.settings import directory_of, keep_settings, settings_of
from megatron_fipo.evaluation.weights import Weights, find_weights, huggingface_directory
from megatron_fipo.files import write_json_atomically
from megatron_fipo.launch.first_look import look_first
from megatron_fipo.processes.ending import terminate_on_sigterm
from megatron_fipo.processes.leftovers import own_place, remove_outside, remove_partial_files, say_removed
from megatron_fipo.records.problem import Problem
from megatron_fipo.records.sample import Group
from megatron_fipo.rollout.judged_rollouts import JudgedRollouts, tokenizer_of, validation_samples
from megatron_fipo.rollout.main_loop import MainLoop
from megatron_fipo.rollout.ongoing import Ongoing
from megatron_fipo.tracking.problem_files import write_problems
from megatron_fipo.tracking.run_files import write_config, write_environment
from megatron_fipo.tracking.run_lock import RunLock
from megatron_fipo.weights.formats import is_checkpoint

USAGE = """usage: megatron-fipo evaluate [GROUP=CHOICE ...] [SECTION.KEY=VALUE ...]

Accuracy of a model on problems: avg@k, cons@k, pass@k with intervals. After a stop, the same command resumes.

  model.path=DIRECTORY          Hugging Face directory, checkpoint, or a run's directory (its newest checkpoint)
  data.validation=[FILE]        problems; data=gsm8k, data=math: from the hub; docs/data.md
  validation.samples=32         samples per problem, k; validation.temperature and validation.top_p: how they are drawn
  rollout.servers=2             vLLM servers; rollout.tensor_parallel: GPUs of each
  rollout.max_response_length   longest response, in tokens
  reward.rule=math_verify       how responses are judged; docs/rewards.md
  evaluation.directory=PLACE    directory for the files

examples:
  megatron-fipo evaluate                                        the embedded model; needs no GPU
  megatron-fipo evaluate model.path=runs/mine validation.samples=8
  megatron-fipo evaluate experiment=evaluate_aime model.path=models/Qwen2.5-32B
  megatron-fipo evaluate experiment=evaluate_aime --cfg job     print the configuration and stop

docs/evaluate.md has the files, the scores and what the intervals mean."""


def main(config: Config, said: Sequence[str]) -> None:
    """Evaluate, print a table and write the files. `said` is the command line, which overrides the run's settings."""
    terminate_on_sigterm()
    _check_said(said)
    weights = find_weights(config.model.path, config.model.fetch_command)
    if weights.run is not None:
        config = with_settings_of(weights.run, config, said)
        check_evaluation(config)
    config = _without_trainer(config)
    check_here_to_sample(config, weights.directory)
    _check_can_be_served(config, weights)
    look_first(config, ("validation",))
    tokenizer = tokenizer_of(config, weights.directory)
    columns = reads_columns(config.reward.rule) or config.environment.is_own
    longest = config.rollout.max_prompt_length
    loaded = load_problems(config.data, "validation", tokenizer, longest, keep_columns=columns)
    settings = settings_of(config, weights, loaded.problems)
    directory = directory_of(config, weights, settings)
    with ExitStack() as stack:
        _take_directory(directory, stack)
        keep_settings(directory, settings)
        samples = stack.enter_context(SampleFile(directory / SAMPLES_FILE))
        missing = _missing(loaded.problems, samples, is_finished=(directory / RESULTS_FILE).exists())
        total = len(loaded.problems)
        terminal = stack.enter_context(EvaluationProgress(total, total - len(missing)))
        terminal.note(f"model: {weights.directory}\nfiles: {directory}\nproblems: {loaded.counts}")
        if weights.run is not None:
            terminal.note(f"settings: from {weights.run}, unless the command line sets others")
        for warning in loaded.warnings:
            terminal.warn(warning)
        if missing:
            if len(missing) < total:
                terminal.note(f"{total - len(missing)} problems were finished by an earlier start")
            write_config(directory, config)
            write_environment(directory)
            evaluation = Evaluation(config, weights, directory, tokenizer, terminal)
            try:
                evaluation.sample(loaded.problems, missing, samples)
            except BaseException:  # Ctrl-C too
                terminal.note(f"{len(samples.done)} of {total} problems are done; the same command resumes from there")
                raise
        sampled = [samples.done[problem.id] for problem in loaded.problems]
        _finish(directory, weights, settings, sampled, config.validation.samples, terminal)


class Evaluation:
    """The part that needs servers: sampling the missing problems."""

    def __init__(
        self, config: Config, weights: Weights, directory: Path, tokenizer: Tokenizer, terminal: EvaluationProgress
    ):
        self._config, self._weights, self._directory = config, weights, directory
        self._tokenizer, self._terminal = tokenizer, terminal

    def sample(self, problems: list[Problem], missing: list[int], samples: SampleFile) -> None:
        """Sample and judge the problems with these indices. Each is written to the file as soon as it is judged.

        Raises:
            FipoError: a server, a verifier or the weights failed, or too many checks failed. In the last case all
                problems are in the file.
        """
        config = self._config
        model_dir = huggingface_directory(self._weights, self._directory / "model")
        context, started = config.model.max_position_embeddings, time.monotonic()
        pool = EnginePool(
            config.rollout,
            model_dir,
            self._directory,
            config.run.seed,
            context,
            self._terminal.warn,
            beside_trainer=False,
        )
        fewest, loop = validation_samples(config), MainLoop()
        with (
            closing(loop),
            JudgedRollouts(config, model_dir, self._tokenizer, pool, self._directory, fewest, loop) as rollouts,
        ):
            if config.rollout.addresses:
                check_served(pool, model_dir)
            engines = rollouts.connect()
            self._terminal.note(f"servers are ready after {time.monotonic() - started:.0f} s")
            started = time.monotonic()
            # By the place among all problems, as a run's validation has it.
            seeds = [rollouts.seed_of("validation", index) for index in missing]
            sampling = rollouts.groups(
                [problems[index] for index in missing],
                config.validation.samples,
                rollouts.validation_sampling(),
                seeds,
                self._terminal.progress,
                on_judged=samples.append,
            )
            groups = Ongoing(engines, sampling).to_the_end(pool.admit)
        self._say_speed(groups, time.monotonic() - started)
        shutil.rmtree(self._directory / "model", ignore_errors=True)
        if warning := rollouts.failed_checks(groups, "in this evaluation", self._terminal.note):
            self._terminal.warn(warning)

    def _say_speed(self, groups: list[Group], seconds: float) -> None:
        samples = [sample for group in groups for sample in group.samples]
        tokens = sum(sample.actions for sample in samples)
        speed = f"{seconds:.1f} s, {tokens / seconds:.0f} tokens per second"
        self._terminal.note(f"{len(samples)} responses of {tokens} tokens in all: {speed}")


def _missing(problems: list[Problem], samples: SampleFile, *, is_finished: bool) -> list[int]:
    """Return the indices of problems to sample. After a stop, problems with failed checks are sampled again too."""
    done = {name for name, found in samples.done.items() if is_finished or not found.has_failed_checks}
    return [index for index, problem in enumerate(problems) if problem.id not in done]


def _check_can_be_served(config: Config, weights: Weights) -> None:
    if config.rollout.addresses and is_checkpoint(weights.directory):
        raise ConfigError(
            "model.path",
            f"{weights.directory} is a checkpoint, which the servers of rollout.addresses cannot have loaded",
            "an exported Hugging Face directory, or rollout.addresses=[] rollout.servers=1",
        )


def _without_trainer(config: Config) -> Config:
    """Return the configuration without rollout.shared_gpu: without a trainer, servers need not sleep."""
    return with_values(config, {"rollout.shared_gpu": False})


def _check_said(said: Sequence[str]) -> None:
    """Raise ConfigError for run.directory, which evaluate does not read. The user expects the files there."""
    for word in said:
        name, _, place = word.lstrip("+").partition("=")
        if name == "run.directory":
            raise ConfigError(name, "it is a training run's", f"evaluation.directory={place}")


def _take_directory(directory: Path, stack: ExitStack) -> None:
    """Make the directory, keep other evaluations out of it, and remove the remains of a killed one."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        remedy = "a directory that can be written"
        raise ConfigError("evaluation.directory", f"{directory} cannot be made: {error}", remedy) from error
    stack.enter_context(RunLock(directory, lambda text: print(text, flush=True)))
    say_removed(directory, remove_partial_files(directory) + remove_outside(directory))
    stack.callback(remove_outside, directory)
    stack.enter_context(own_place(directory))


def _finish(
    directory: Path,
    weights: Weights,
    settings: dict[str, Any],
    sampled: list[SampledProblem],
    k: int,
    terminal: EvaluationProgress,
) -> None:
    """Write and print the results."""
    scores = summarise(sampled, k)
    write_problems(directory / PROBLEMS_FILE, [problem.scores(k) for problem in sampled])
    write_json_atomically(
        directory / RESULTS_FILE, {"model": weights.name, "scores": scores, "settings": settings, "version": 1}
    )
    overall = scores[ALL]
    terminal.show(table(scores))
    terminal.note(
        f"right in every sample: {overall['always_right']}, in some: {overall['sometimes_right']}, in none: "
        f"{overall['never_right']} of {overall['problems']} problems"
    )
    for name, what in ((RESULTS_FILE, "scores"), (PROBLEMS_FILE, "each problem"), (SAMPLES_FILE, "each response")):
        terminal.note(f"  {os.path.relpath(directory / name)}  {what}")


if __name__ == "__main__":
    run_with_config(functools.partial(main, said=sys.argv[1:]), judge=check_evaluation, usage=USAGE)
