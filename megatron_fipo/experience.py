"""Rank 0's side of a step: draw problems, sample and judge responses, keep the groups that teach something.

Rewards are judged while other groups are still being sampled. Everything random is a function of (run.seed, what is
drawn), so a run that is repeated, or resumed, asks for the same samples.
"""

import asyncio
import random
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import torch
from torch import Tensor

from megatron_fipo import loop_state
from megatron_fipo.algorithm.advantages import group_advantages
from megatron_fipo.algorithm.groups import DynamicSampling, Selection
from megatron_fipo.config import AlgorithmConfig, Config
from megatron_fipo.data.fingerprint import compare_for_resume
from megatron_fipo.data.order import ProblemOrder
from megatron_fipo.data.problems import load_problems
from megatron_fipo.data.tokenizers import load_tokenizer
from megatron_fipo.data.vocabulary import check_vocabulary, outside
from megatron_fipo.errors import DataError, RolloutError
from megatron_fipo.loop_state import ExperienceState, LoopState
from megatron_fipo.policy.batches import Sequences
from megatron_fipo.rewards.failed_checks import judge_failed_checks
from megatron_fipo.rewards.pool import VerifierPool
from megatron_fipo.rollout.client import RolloutClient, Sampling
from megatron_fipo.rollout.control import ControlPlane
from megatron_fipo.rollout.service import RolloutService
from megatron_fipo.samples import Group, Problem
from megatron_fipo.tracking.console import Console, Phase
from megatron_fipo.tracking.validation import ValidationResult, score
from megatron_fipo.weights.architectures import read_architecture
from megatron_fipo.weights.deadline import Deadline


class Experience:
    """Problems, the rollout service and the verifiers of a run; lives on rank 0. A context manager, which ends them."""

    def __init__(self, config: Config, model_dir: Path, run_dir: Path, console: Console):
        """Load the problems and start servers and verifiers, without waiting for them."""
        self.config, self.console = config, console
        self.vocab_size = read_architecture(model_dir).vocab_size
        self.tokenizer = load_tokenizer(model_dir, config.data)
        check_vocabulary(model_dir, self.tokenizer.size, self.tokenizer.ends, self.vocab_size)
        length, validates = config.rollout.max_prompt_length, config.validation.every > 0
        train = load_problems(config.data, "train", self.tokenizer, length, validates=validates)
        for warning in train.warnings:
            console.warn(warning)
        self.problems, self.fingerprint = train.problems, train.fingerprint
        self.held_out: list[Problem] = []
        if validates:
            validation = load_problems(config.data, "validation", self.tokenizer, length)
            for warning in validation.warnings:
                console.warn(warning)
            self.held_out = validation.problems
        self.problem_counts = train.counts
        self.order = ProblemOrder(len(self.problems), config.run.seed, config.data.shuffle)
        self.sampling = DynamicSampling(config.algorithm.filter_groups, config.algorithm.prompts_per_step)
        self.drawn = 0
        self.service = RolloutService(
            config.rollout, model_dir, run_dir, config.run.seed, config.model.max_position_embeddings, console.warn
        )
        self.verifiers = VerifierPool(config.reward, config.rollout.max_response_length)
        self.service.start()
        self.client: RolloutClient | None = None

    def __enter__(self) -> "Experience":
        return self

    def __exit__(self, *exception: object) -> None:
        if self.client is not None:
            self.client.close()
        self.verifiers.close()
        self.service.close()

    def connect(self, revive: Callable[[], None]) -> RolloutClient:
        """Wait until the servers answer; the client of this run. `revive` is called when it has lost all of them."""
        self.service.wait_ready()
        self.client = RolloutClient(self.service, revive)
        return self.client

    def make_room(self) -> None:
        """Have the servers free the GPUs that they share with the trainer, until the next weight update."""
        if self.client is None:
            self.service.wait_ready()
        else:
            # One that is starting again would take its memory in the middle of an update.
            self.service.admit()
        control = ControlPlane(self.service)
        asyncio.run(control.sleep(Deadline(self.config.rollout.update_timeout_s)))

    def lose_failed(self) -> bool:
        """Replace the servers that made a weight update fail; False if none did, or if that was tried too often."""
        assert self.client is not None, "connect() comes first"
        try:
            return self.client.control.lose_failed()
        except RolloutError as error:
            self.console.warn(str(error))
            return False

    def collect(self, phase: Phase) -> tuple[Selection, list[Group]]:
        """Sample generation batches until the step is full, or may sample no more.

        Returns:
            What to train on, and every group that was sampled in this step.

        Raises:
            RewardError: too many checks failed; no further batch is sampled then.
        """
        algorithm, rollout = self.config.algorithm, self.config.rollout
        sampling = self._sampling(rollout.temperature, rollout.top_p, rollout.top_k)
        sampled: list[Group] = []
        warning = None
        while self.sampling.needs_more():
            wanted = algorithm.prompts_per_step
            if algorithm.filter_groups.enable:
                wanted = algorithm.generation_batch_prompts or wanted
            problems = [self.problems[index] for index in self.order.take(wanted)]
            seeds = [self._seed("train", self.drawn + offset) for offset in range(wanted)]
            self.drawn += wanted
            groups = self._sample(problems, algorithm.samples_per_prompt, sampling, seeds, phase)
            self.sampling.add(groups)
            sampled += groups
            warning = judge_failed_checks(sampled, self.config.reward, "in this step")
        if warning:
            self.console.warn(warning)
        return self.sampling.take(), sampled

    def validate(self, phase: Phase) -> ValidationResult:
        """Sample and score the held-out problems, with the same seeds every time."""
        settings = self.config.validation
        sampling = self._sampling(settings.temperature, settings.top_p, top_k=-1)
        seeds = [self._seed("validation", index) for index in range(len(self.held_out))]
        groups = self._sample(self.held_out, settings.samples, sampling, seeds, phase)
        if warning := judge_failed_checks(groups, self.config.reward, "in this validation"):
            self.console.warn(warning)
        return score(groups, settings.samples)

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
    ) -> list[Group]:
        """Judged groups in the order of their problems."""
        assert self.client is not None, "connect() comes first"
        judged: list[Future[Group]] = []

        def judge(group: Group) -> None:
            self._check_token_ids(group)
            group.text = [self.tokenizer.decode(response.token_ids) for response in group.responses]
            judged.append(self.verifiers.submit(group))
            phase.progress(len(judged), len(problems), "groups")

        # Nobody may have asked for a long time.
        self.service.lose_unfit()
        groups = self.client.generate(problems, samples, sampling, seeds, on_group=judge)
        with self.console.phase("verify") as verifying:
            for done, future in enumerate(judged, start=1):
                future.result()
                verifying.progress(done, len(judged), "groups")
        return groups

    def _check_token_ids(self, group: Group) -> None:
        """Raise RolloutError for an id that the policy has no embedding for, before anything is trained on it."""
        for token_ids in (group.problem.token_ids, *(response.token_ids for response in group.responses)):
            if (token := outside(token_ids, self.vocab_size)) is not None:
                raise RolloutError(
                    f"a server's answer has the token id {token} for problem {group.problem.id}, outside the "
                    f"{self.vocab_size} of the model {self.config.model.path}"
                )

    def _check_lengths(self, carried: list[Group]) -> None:
        """Raise DataError for a group that micro-batches of this configuration may have no room for."""
        rollout = self.config.rollout
        prompt = max((len(group.problem.token_ids) for group in carried), default=0)
        response = max((len(response.token_ids) for group in carried for response in group.responses), default=0)
        for name, found, limit in (
            ("prompt", prompt, rollout.max_prompt_length),
            ("response", response, rollout.max_response_length),
        ):
            if found > limit:
                raise DataError(
                    f"kept has a {name} of {found} tokens, which was sampled before rollout.max_{name}_length={limit}: "
                    f"resume with at least {found}"
                )

    def _sampling(self, temperature: float, top_p: float, top_k: int) -> Sampling:
        longest = self.config.rollout.max_response_length
        return Sampling(temperature, top_p, top_k, longest, self.tokenizer.eos_ids)

    def _seed(self, purpose: str, index: int) -> int:
        return random.Random(f"{self.config.run.seed}:{purpose}:{index}").getrandbits(31)


def training_sequences(groups: list[Group], algorithm: AlgorithmConfig, weight_version: int) -> Sequences:
    """Groups as tensors, cut into mini-batches of whole groups, each response with its advantage.

    A response whose check failed is no wrong answer: it is left out, of the group's mean too.
    """
    tokens: list[Tensor] = []
    log_probs: list[Tensor] = []
    prompts: list[int] = []
    advantages: list[float] = []
    weight_lag: list[int] = []
    sizes: list[int] = []
    for start in range(0, len(groups), algorithm.mini_batch_prompts):
        before = len(tokens)
        for group in groups[start : start + algorithm.mini_batch_prompts]:
            pairs = zip(group.responses, group.judgements, strict=True)
            judged = [(response, judgement) for response, judgement in pairs if judgement.was_judged]
            prompt = group.problem.token_ids
            tokens += [torch.tensor([*prompt, *response.token_ids]) for response, _ in judged]
            prompts += [len(prompt)] * len(judged)
            log_probs += [torch.tensor(response.log_probs) for response, _ in judged]
            weight_lag += [weight_version - response.weight_version for response, _ in judged]
            rewards = [judgement.reward for _, judgement in judged]
            advantages += group_advantages(rewards, norm_by_std=algorithm.norm_adv_by_std)
        if len(tokens) > before:
            sizes.append(len(tokens) - before)
    return Sequences(tokens, prompts, log_probs, torch.tensor(advantages), torch.tensor(weight_lag), sizes)
