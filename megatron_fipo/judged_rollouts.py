"""Problems in, judged groups out: a tokenizer, the rollout service and the verifiers, by which training samples its
steps and validations, and `evaluate` everything.

Rewards are judged while other groups are still being sampled. Everything random is a function of (run.seed, what is
drawn), so a run that is repeated, or resumed, asks for the same samples. Imports neither torch nor Megatron-Core.
"""

import random
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from megatron_fipo.config import Config
from megatron_fipo.data.tokenizers import load_tokenizer
from megatron_fipo.data.vocabulary import check_vocabulary
from megatron_fipo.models.model_config import read_architecture
from megatron_fipo.records.problem import Problem
from megatron_fipo.records.sample import Group
from megatron_fipo.rewards.failed_checks import judge_failed_checks
from megatron_fipo.rewards.failures import FailureLog
from megatron_fipo.rewards.pool import RewardPool
from megatron_fipo.rollout.client import RolloutClient
from megatron_fipo.rollout.service import RolloutService
from megatron_fipo.rollout.work import Sampling

Progress = Callable[[int, int, str], None]
"""Told how many of how many are done, and of what."""


class JudgedRollouts:
    """The rollout service and the verifiers of a run or an evaluation. A context manager, which ends them."""

    def __init__(self, config: Config, model_dir: Path):
        """Read the tokenizer; nothing starts yet."""
        self.config = config
        self.vocab_size = read_architecture(model_dir).vocab_size
        self.tokenizer = load_tokenizer(model_dir, config.data)
        check_vocabulary(model_dir, self.tokenizer.size, self.tokenizer.ends, self.vocab_size)
        self.client: RolloutClient | None = None

    def start(self, service: RolloutService, directory: Path) -> None:
        """See that rewards can be had, and start servers without waiting for them; `directory` is for the run's files.

        Raises:
            ConfigError, RewardError: as RewardPool.wait_started.
        """
        self.service = service
        limit = self.config.rollout.max_response_length
        self.verifiers = RewardPool(self.config.reward, limit, FailureLog(directory))
        self.verifiers.wait_started()
        service.start()

    def __enter__(self) -> "JudgedRollouts":
        return self

    def __exit__(self, *exception: object) -> None:
        if self.client is not None:
            self.client.close()
        self.verifiers.close()
        self.service.close()

    def connect(self, revive: Callable[[], None]) -> RolloutClient:
        """Wait until the servers answer; the client of this run. `revive` is called when it has lost all of them."""
        self.service.wait_ready()
        self.client = RolloutClient(self.service, revive, self.vocab_size)
        return self.client

    def sample(
        self,
        problems: list[Problem],
        samples: int,
        sampling: Sampling,
        seeds: list[int],
        progress: Progress,
        on_judged: Callable[[Group], None] | None = None,
    ) -> list[Future[Group]]:
        """Groups that are being judged, in the order of their problems; all of them are sampled.

        A future gives its group when it is judged and `on_judged`, called in a verifier's thread, has returned.
        """
        assert self.client is not None, "connect() comes first"
        judged: dict[int, Future[Group]] = {}

        def judge(group: Group) -> None:
            texts = [self.tokenizer.decode(sample.token_ids.tolist()) for sample in group.samples]
            future = self.verifiers.submit(group.with_texts(texts))
            # By the object, which `generate` returns too: two groups may be of one problem.
            judged[id(group)] = future if on_judged is None else _after(future, on_judged)
            progress(len(judged), len(problems), "groups")

        # Nobody may have asked for a long time.
        self.service.lose_unfit()
        return [judged[id(group)] for group in self.client.generate(problems, samples, sampling, seeds, judge)]

    def failed_checks(self, groups: list[Group], where: str, note: Callable[[str], None]) -> str | None:
        """Show the first traceback, by `note`; then a warning, or RewardError, where too many checks failed.

        `where` completes "of the checks", such as "in this step".
        """
        failures = self.verifiers.failures
        if traceback := failures.traceback_to_show():
            note(f"the first check that raised an exception:\n{traceback}")
        return judge_failed_checks(groups, self.config.reward, where, failures.summary())

    def validation_sampling(self) -> Sampling:
        """How responses to held-out problems are sampled."""
        return self.sampling_of(self.config.validation.temperature, self.config.validation.top_p, top_k=-1)

    def sampling_of(self, temperature: float, top_p: float, top_k: int) -> Sampling:
        """How responses are sampled, with the run's length limit and the model's own ends."""
        longest = self.config.rollout.max_response_length
        return Sampling(temperature, top_p, top_k, longest, self.tokenizer.eos_ids)

    def seed_of(self, purpose: str, index: int) -> int:
        """The seed of the request that draws the `index`-th of something: train, validation."""
        return random.Random(f"{self.config.run.seed}:{purpose}:{index}").getrandbits(31)


def _after(future: Future[Group], action: Callable[[Group], None]) -> Future[Group]:
    """A future of the same group, which waits for `action` too and fails with it."""
    done: Future[Group] = Future()

    def pass_on(finished: Future[Group]) -> None:
        try:
            group = finished.result()
            action(group)
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(group)

    future.add_done_callback(pass_on)
    return done
