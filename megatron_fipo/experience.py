"""Rank 0's side of a step: draw problems, sample and judge responses, keep the groups that teach something."""

import asyncio
from pathlib import Path

from megatron_fipo import loop_state
from megatron_fipo.algorithm.groups import DynamicSampling, Selection
from megatron_fipo.config import Config
from megatron_fipo.config.loop import own_rule
from megatron_fipo.data.fingerprint import compare_for_resume
from megatron_fipo.data.order import ProblemOrder
from megatron_fipo.data.problems import load_problems
from megatron_fipo.engines.control import EngineControl
from megatron_fipo.engines.pool import EnginePool
from megatron_fipo.errors import DataError, RolloutError
from megatron_fipo.judged_rollouts import JudgedRollouts
from megatron_fipo.loop_state import ExperienceState, LoopState
from megatron_fipo.records.problem import Problem
from megatron_fipo.records.sample import Group
from megatron_fipo.rollout.events import Steps
from megatron_fipo.rollout.work import Sampling
from megatron_fipo.tracking.console import Console, Phase
from megatron_fipo.tracking.validation import ValidationResult, score
from megatron_fipo.weights.deadline import Deadline


class Experience(JudgedRollouts):
    """Problems, the servers and the verifiers of a run; lives on rank 0. A context manager, which ends them."""

    def __init__(self, config: Config, model_dir: Path, run_dir: Path, console: Console):
        """Load the problems, see that rewards can be had, and start servers, without waiting for them."""
        super().__init__(config, model_dir)
        self.console = console
        length, validates = config.rollout.max_prompt_length, config.validation.every > 0
        columns = own_rule(config.reward.rule) is not None or config.environment.is_own
        train = load_problems(config.data, "train", self.tokenizer, length, validates=validates, keep_columns=columns)
        for warning in train.warnings:
            console.warn(warning)
        self.problems, self.fingerprint = train.problems, train.fingerprint
        self.held_out: list[Problem] = []
        if validates:
            validation = load_problems(config.data, "validation", self.tokenizer, length, keep_columns=columns)
            for warning in validation.warnings:
                console.warn(warning)
            self.held_out = validation.problems
        self.problem_counts = train.counts
        self.order = ProblemOrder(len(self.problems), config.run.seed, config.data.shuffle)
        self.sampling = DynamicSampling(config.algorithm.filter_groups, config.algorithm.prompts_per_step)
        self.drawn = 0
        context = config.model.max_position_embeddings
        pool = EnginePool(config.rollout, model_dir, run_dir, config.run.seed, context, console.warn)
        samples = config.algorithm.samples_per_prompt
        self.start(pool, run_dir, min(samples, self.validation_samples()) if validates else samples)

    def __enter__(self) -> "Experience":
        return self

    def make_room(self) -> None:
        """Have the servers free the GPUs that they share with the trainer, until the next weight update."""
        if self.client is None:
            self.pool.wait_ready()
        else:
            # One that is starting again would take its memory in the middle of an update.
            self.pool.admit()
        control = EngineControl(self.pool)
        asyncio.run(control.sleep(Deadline(self.config.rollout.update_timeout_s)))

    def replace_failed(self) -> bool:
        """Replace the servers that made a weight update fail; False if none did, or if that was tried too often."""
        try:
            return self.pool.repair()
        except RolloutError as error:
            self.console.warn(str(error))
            return False

    def collect(self, phase: Phase) -> Steps[tuple[Selection, list[Group]]]:
        """Sample generation batches until the step is full, or may sample no more.

        Returns:
            What to train on, and every group that was sampled in this step.

        Raises:
            RewardError: too many checks failed; no further batch is sampled then.
        """
        algorithm, rollout = self.config.algorithm, self.config.rollout
        sampling = self.sampling_of(rollout.temperature, rollout.top_p, rollout.top_k)
        sampled: list[Group] = []
        warning = None
        while self.sampling.needs_more():
            wanted = algorithm.prompts_per_step
            if algorithm.filter_groups.enable:
                wanted = algorithm.generation_batch_prompts or wanted
            problems = [self.problems[index] for index in self.order.take(wanted)]
            seeds = [self.seed_of("train", self.drawn + offset) for offset in range(wanted)]
            self.drawn += wanted
            groups = yield from self._sample(problems, algorithm.samples_per_prompt, sampling, seeds, phase)
            self.sampling.add(groups)
            sampled += groups
            warning = self.failed_checks(sampled, "in this step", self.console.note)
        if warning:
            self.console.warn(warning)
        return self.sampling.take(), sampled

    def validate(self, phase: Phase) -> Steps[tuple[ValidationResult, list[Group]]]:
        """Sample and score the held-out problems, with the same seeds every time. The scores, and what they are of."""
        settings = self.config.validation
        seeds = [self.seed_of("validation", index) for index in range(len(self.held_out))]
        groups = yield from self._sample(self.held_out, settings.samples, self.validation_sampling(), seeds, phase)
        if warning := self.failed_checks(groups, "in this validation", self.console.note):
            self.console.warn(warning)
        return score(groups, settings.samples), groups

    def state(self) -> ExperienceState[Group]:
        """State between two steps."""
        return ExperienceState(self.order.state(), self.drawn, self.sampling.carried(), self.fingerprint)

    def resume(self, json_file: Path, arrays_file: Path, step: int) -> LoopState[Group]:
        """Go on from the state in a checkpoint of `step`, and return it. DataError, with file and key, if it cannot."""
        state = loop_state.read(json_file, arrays_file, step=step, vocab_size=self.vocab_size)
        try:
            self.load(state.experience)
        except DataError as error:
            raise DataError(f"{json_file}: experience.{error}") from None
        return state

    def load(self, state: ExperienceState[Group]) -> None:
        """Go on where `state` stood: no problem skipped, none repeated.

        DataError where the data is another, unless data.allow_change; its order then begins a new epoch. And where a
        carried group is too long for this configuration.
        """
        resumes_changed = self.config.run.resume_changed
        allow_change = self.config.data.allow_change or resumes_changed
        keeps_order, warning = compare_for_resume(self.fingerprint, state.data, allow_change)
        if warning:
            self.console.warn(warning)
        self._check_lengths(state.kept)
        if keeps_order and not (resumes_changed and self.order.is_another(state.order)):
            self.order.load(state.order)
        else:
            self.order.start_over(state.order)
        self.sampling.carry(state.kept)
        self.drawn = state.drawn

    def _sample(
        self, problems: list[Problem], samples: int, sampling: Sampling, seeds: list[int], phase: Phase
    ) -> Steps[list[Group]]:
        """Judged groups in the order of their problems."""
        judged = yield from self.sample(problems, samples, sampling, seeds, phase.progress)
        groups = []
        with self.console.phase("verify") as verifying:
            for future in judged:
                groups.append(future.result())
                verifying.progress(len(groups), len(judged), "groups")
        return groups

    def _check_lengths(self, carried: list[Group]) -> None:
        """Raise DataError for a group that micro-batches of this configuration may have no room for."""
        rollout = self.config.rollout
        prompt = max((len(group.problem.token_ids) for group in carried), default=0)
        response = max((len(sample) for group in carried for sample in group.samples), default=0)
        for name, found, limit in (
            ("prompt", prompt, rollout.max_prompt_length),
            ("response", response, rollout.max_response_length),
        ):
            if found > limit:
                raise DataError(
                    f"kept has a {name} of {found} tokens, which was sampled before rollout.max_{name}_length={limit}: "
                    f"resume with at least {found}"
                )
