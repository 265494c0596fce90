"""A training run's rollouts, complete: problems, servers and verifiers, and the collector of its batches."""

import asyncio
from dataclasses import replace
from pathlib import Path

from megatron_fipo.config import Config
from megatron_fipo.config.loop import reads_columns
from megatron_fipo.data.fingerprint import compare_for_resume
from megatron_fipo.data.order import PromptSampler
from megatron_fipo.data.problems import load_problems
from megatron_fipo.engines.control import EngineControl
from megatron_fipo.engines.pool import EnginePool
from megatron_fipo.errors import DataError, RolloutError
from megatron_fipo.models.model_config import read_architecture
from megatron_fipo.records.problem import Problem
from megatron_fipo.records.routes import route_format
from megatron_fipo.records.sample import Group, Partial
from megatron_fipo.rollout.admission import admission_of
from megatron_fipo.rollout.collector import Batch, CollectorState, RolloutCollector, Sampler
from megatron_fipo.rollout.filters import group_filter
from megatron_fipo.rollout.judged_rollouts import JudgedRollouts, tokenizer_of, validation_samples
from megatron_fipo.rollout.listener import Listener, Progress
from megatron_fipo.rollout.main_loop import MainLoop
from megatron_fipo.rollout.ongoing import Ongoing
from megatron_fipo.rollout.snapshot import RolloutState
from megatron_fipo.rollout.work import Work
from megatron_fipo.weights.deadline import Deadline

_PARTS = 4
"""Of a batch, at most about: each costs a few collectives."""


class TrainingRollouts(JudgedRollouts):
    """What rank 0 has for sampling. A context manager, which ends servers and verifiers."""

    def __init__(self, config: Config, model_dir: Path, run_dir: Path, listener: Listener, loop: MainLoop):
        """Load the problems, see that rewards can be had, and start servers, without waiting for them."""
        tokenizer = tokenizer_of(config, model_dir)
        length, validates = config.rollout.max_prompt_length, config.validation.every > 0
        columns = reads_columns(config.reward.rule) or config.environment.is_own
        train = load_problems(config.data, "train", tokenizer, length, validates=validates, keep_columns=columns)
        for warning in train.warnings:
            listener.warn(warning)
        held_out: list[Problem] = []
        if validates:
            validation = load_problems(config.data, "validation", tokenizer, length, keep_columns=columns)
            for warning in validation.warnings:
                listener.warn(warning)
            held_out = validation.problems
        context, samples = config.model.max_position_embeddings, config.algorithm.samples_per_prompt
        replays = config.algorithm.router_replay == "rollout"
        self._routes = route_format(read_architecture(model_dir).experts) if replays else None
        pool = EnginePool(
            config.rollout,
            model_dir,
            run_dir,
            config.run.seed,
            context,
            listener.warn,
            returns_routes=replays,
            run=loop.run,
        )
        fewest = min(samples, validation_samples(config)) if validates else samples
        overlaps = config.rollout.max_off_policy_steps > 0
        # A phase belongs to a step, and what goes on beside steps has none.
        super().__init__(config, model_dir, tokenizer, pool, run_dir, fewest, loop, None if overlaps else listener)
        self._listener, self._held_out = listener, held_out
        self.problems, self.problem_counts, self._fingerprint = train.problems, train.counts, train.fingerprint
        self._prompts = PromptSampler(len(self.problems), config.run.seed, config.data.shuffle)
        self._collector = RolloutCollector(
            self.problems,
            self._prompts,
            admission_of(config.algorithm, config.rollout.max_off_policy_steps),
            group_filter(config.algorithm.filter_groups),
            Sampler(self._work, self._judged, loop.begin),
            lambda number: self.seed_of("train", number),
            overlaps=overlaps,
            part_prompts=part_prompts(config),
        )
        self._progress: Progress = _nobody_hears
        self._in_step: list[Group] = []
        """Judged since the last batch."""

    def __enter__(self) -> "TrainingRollouts":
        return self

    def make_room(self) -> None:
        """Have the servers free the GPUs that they share with the trainer, until the next weight update."""
        if self.client is None:
            self.pool.wait_ready()
        else:
            # One that is starting again would take its memory in the middle of an update.
            self.pool.admit()
        control = EngineControl(self.pool)
        self.loop.run(control.sleep(Deadline(self.config.rollout.update_timeout_s)))

    def replace_failed(self) -> bool:
        """Replace the servers that made a weight update fail; False if none did, or if that was tried too often."""
        try:
            return self.pool.replace_failed()
        except RolloutError as error:
            self._listener.warn(str(error))
            return False

    def begin_batch(self, progress: Progress) -> Ongoing[Batch]:
        """Sample until a batch is there; it ends with RewardError where too many checks failed."""
        assert self.client is not None, "connect() comes first"
        self._progress = progress
        self.pool.lose_unfit()  # nobody may have asked for a long time
        return Ongoing(self.client, self._next_batch())

    def begin_validation(self, progress: Progress) -> Ongoing[list[Group]]:
        """Sample and judge the held-out problems, with the same seeds every time."""
        assert self.client is not None, "connect() comes first"
        self.pool.lose_unfit()
        return Ongoing(self.client, self._validate(progress))

    @property
    def part_ready(self) -> asyncio.Event:
        """Set while `part` has something new."""
        return self._collector.part_ready

    def part(self) -> list[Group]:
        """See RolloutCollector.part."""
        return self._collector.part()

    def settle(self, version: int) -> None:
        """The servers have the weights `version`; the batch that was taken before, if one was, is trained."""
        self._collector.settle(version, opens=version < self.config.run.steps)

    def break_off(self) -> None:
        """Nobody waits for the batch that was begun; see RolloutCollector.break_off."""
        self.loop.run(self._collector.break_off())
        self._in_step.clear()

    def busy(self) -> list[tuple[float, float]]:
        """Stretches of time, since the last call, in which some server sampled: begin and seconds."""
        return self.client.busy() if self.client else []

    def forget_occupancy(self) -> None:
        """Leave out of the next `end_step` how busy servers were until now."""
        if self.client is not None:
            self.client.forget_occupancy()

    def end_step(self) -> dict[str, int | float]:
        """A step is done: metrics of the servers in it, and of all tickets so far."""
        requests = self.client.end_step() if self.client else {}
        return {**self.pool.end_step(), **requests, **self._collector.metrics()}

    def snapshot(self) -> RolloutState:
        """The present state, for a checkpoint."""
        return RolloutState(self._collector.snapshot(), self._fingerprint)

    def restore(self, state: RolloutState) -> None:
        """Go on where `state` of a checkpoint stood.

        Raises:
            DataError: the data is another, unless data.allow_change; its order then begins a new epoch. Or a group is
                too long for this configuration.
        """
        config, collected = self.config, state.collected
        resumes_changed = config.run.resume_changed
        allow_change = config.data.allow_change or resumes_changed
        keeps_order, warning = compare_for_resume(self._fingerprint, state.data, allow_change)
        if warning:
            self._listener.warn(warning)
        discards = config.checkpoint.in_flight == "discard"
        if not discards:
            self._check_lengths(collected)
        is_another = resumes_changed and self._prompts.is_another(collected.order)
        new_order = is_another or not keeps_order
        if count := self._collector.restore(collected, new_order=new_order, discard=discards):
            self._listener.note(f"checkpoint.in_flight=discard: {count} prompts that were in flight are sampled anew")

    async def _next_batch(self) -> Batch:
        batch = await self._collector.next_batch()
        warning = self._warn_of_failed_checks()
        self._in_step.clear()
        self._progress = _nobody_hears
        if warning:
            self._listener.warn(warning)
        return batch

    async def _validate(self, progress: Progress) -> list[Group]:
        seeds = [self.seed_of("validation", index) for index in range(len(self._held_out))]
        samples, sampling = self.config.validation.samples, self.validation_sampling()
        groups = await self.groups(self._held_out, samples, sampling, seeds, progress)
        if warning := self.failed_checks(groups, "in this validation", self._listener.note):
            self._listener.warn(warning)
        return groups

    def _work(self, problem: Problem, seed: int) -> Work:
        """What the collector asks for."""
        rollout = self.config.rollout
        sampling = self.sampling_of(rollout.temperature, rollout.top_p, rollout.top_k)
        sampling = replace(sampling, routes=self._routes)
        return Work(problem, self.config.algorithm.samples_per_prompt, sampling, seed)

    async def _judged(self, work: Work) -> Group:
        """Also looks whether verifiers still judge, each time that a step's worth of groups is there."""
        group = await self.judged(work)
        self._in_step.append(group)
        wanted = self.config.algorithm.prompts_per_step
        self._progress(len(self._in_step), max(wanted, len(self._in_step)), "groups")
        if len(self._in_step) % wanted == 0:
            self._warn_of_failed_checks()
        return group

    def _warn_of_failed_checks(self) -> str | None:
        """A warning of the groups since the last batch. RewardError: too many failed."""
        return self.failed_checks(self._in_step, "in this step", self._listener.note)

    def _check_lengths(self, collected: CollectorState) -> None:
        """Raise DataError for a group that micro-batches of this configuration may have no room for."""
        rollout, groups, begun = self.config.rollout, collected.groups.values(), collected.begun.values()
        problems = [*(group.problem for group in groups), *(found.problem for found in begun)]
        prompt = max((len(problem.token_ids) for problem in problems), default=0)
        samples = [sample for group in groups for sample in group.samples]
        # One that goes on has a token more at least.
        parts = [len(part) + isinstance(part, Partial) for found in begun for part in found.parts.values()]
        response = max([*map(len, samples), *parts], default=0)
        for name, found, limit in (
            ("prompt", prompt, rollout.max_prompt_length),
            ("response", response, rollout.max_response_length),
        ):
            if found > limit:
                raise DataError(
                    f"tickets has a {name} of {found} tokens, which was sampled before rollout.max_{name}_length="
                    f"{limit}: resume with at least {found}, or with checkpoint.in_flight=discard"
                )


def part_prompts(config: Config) -> int | None:
    """Prompts of each part in which a batch is handed over, so that idle trainers can score it; None: in no parts.

    A trainer that shares its GPUs with the engines is not idle. The first update scores what it trains on by itself.
    """
    algorithm = config.algorithm
    updates = algorithm.prompts_per_step // algorithm.mini_batch_prompts
    if updates < _PARTS or config.rollout.shared_gpu:
        return None
    return updates // _PARTS * algorithm.mini_batch_prompts


def _nobody_hears(done: int, total: int, unit: str, /) -> None:
    """Before a step has begun."""
