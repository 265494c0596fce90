"""Problems in, judged groups out: a tokenizer, the servers and the verifiers, by which training samples its
steps and validations, and `evaluate` everything.

Rewards are judged while other groups are still being sampled. Everything random is a function of (run.seed, what is
drawn), so a run that is repeated, or resumed, asks for the same samples. Imports neither torch nor Megatron-Core.
"""

import asyncio
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from megatron_fipo.config import Config
from megatron_fipo.data.tokenizers import Tokenizer, load_tokenizer
from megatron_fipo.data.vocabulary import check_vocabulary
from megatron_fipo.engines.descriptors import provide
from megatron_fipo.engines.pool import EnginePool
from megatron_fipo.environments.pool import EnvironmentPool
from megatron_fipo.models.model_config import read_architecture
from megatron_fipo.records.problem import Problem
from megatron_fipo.records.sample import Group
from megatron_fipo.rewards.failed_checks import judge_failed_checks
from megatron_fipo.rewards.failures import FailureLog
from megatron_fipo.rewards.pool import RewardPool
from megatron_fipo.rollout.episode import Episodes, surroundings
from megatron_fipo.rollout.generator import EngineGenerator, connections
from megatron_fipo.rollout.judging_phase import JudgingPhase
from megatron_fipo.rollout.listener import Listener, Progress
from megatron_fipo.rollout.main_loop import MainLoop, all_of
from megatron_fipo.rollout.seeds import request_seed
from megatron_fipo.rollout.work import Sampling, Work


def tokenizer_of(config: Config, model_dir: Path) -> Tokenizer:
    """The model's tokenizer, held against its vocabulary. DataError or ConfigError: it is not the model's."""
    tokenizer = load_tokenizer(model_dir, config.data)
    check_vocabulary(model_dir, tokenizer.size, tokenizer.ends, read_architecture(model_dir).vocab_size)
    return tokenizer


def validation_samples(config: Config) -> int:
    """How many samples of a held-out problem are asked for; greedy ones are all the same, and asked for once."""
    return config.validation.samples if config.validation.temperature else 1


class JudgedRollouts:
    """The servers and the verifiers of a run or an evaluation. A context manager, which ends them."""

    def __init__(
        self,
        config: Config,
        model_dir: Path,
        tokenizer: Tokenizer,
        pool: EnginePool,
        directory: Path,
        fewest_samples: int,
        loop: MainLoop,
        listener: Listener | None = None,
    ):
        """See that rewards can be had, and start servers without waiting for them.

        Args:
            tokenizer: `tokenizer_of` the model.
            directory: for the run's files.
            fewest_samples: no problem will have fewer samples.
            loop: of this thread, closed by whoever made it.
            listener: hears where nothing is left to do but to judge.

        Raises:
            ConfigError, RewardError: as RewardPool.wait_started; as EnvironmentPool.wait_started.
            RolloutError: so many connections to servers may not be opened.
        """
        self.config, self.tokenizer, self.pool, self.loop = config, tokenizer, pool, loop
        self.vocab_size = read_architecture(model_dir).vocab_size
        self.client: EngineGenerator | None = None
        self.environments: EnvironmentPool | None = None
        self._episodes: Episodes | None = None
        self._judging = JudgingPhase(listener)
        rollout = config.rollout
        servers = len(rollout.addresses) or rollout.servers
        what = f"{servers} servers with rollout.max_num_seqs={rollout.max_num_seqs}"
        # A turn is a request for one sample.
        provide(connections(rollout, 1 if config.environment.is_own else fewest_samples), what)
        self.verifiers = RewardPool(config.reward, rollout.max_response_length, FailureLog(directory))
        self.verifiers.wait_started()
        if config.environment.is_own:
            self.environments = EnvironmentPool(config.environment, model_dir, self.vocab_size)
            self.environments.wait_started()
        pool.start()

    def __enter__(self) -> "JudgedRollouts":
        return self

    def __exit__(self, *exception: object) -> None:
        if self.client is not None:
            self.client.close()
        if self.environments is not None:
            self.environments.close()
        self.verifiers.close()
        self.pool.close()

    def connect(self) -> EngineGenerator:
        """Wait until the servers answer; what samples from them in this run."""
        self.pool.wait_ready()
        self.client = EngineGenerator(self.pool, self.vocab_size, self.loop)
        if self.environments is not None:
            around = surroundings(self.config, self.environments, self.tokenizer.decode, self.verifiers.failures)
            self._episodes = Episodes(self.client, around)
        return self.client

    async def judged(self, work: Work, *, first: bool = False) -> Group:
        """The work's group, sampled and judged; `first` before all other work that is not."""
        assert self.client is not None, "connect() comes first"
        self.client.check_prompts([work.problem])
        with self._judging.sampling():
            await (self._episodes or self.client).complete(work, first=first)
        with self._judging.judging():
            # Where nobody waits any more the verdict is still given.
            judged = asyncio.wrap_future(self.verifiers.submit(work.group, self.tokenizer.decode))
            return await asyncio.shield(judged)

    async def groups(
        self,
        problems: Sequence[Problem],
        samples: int,
        sampling: Sampling,
        seeds: Sequence[int],
        progress: Progress,
        on_judged: Callable[[Group], None] | None = None,
    ) -> list[Group]:
        """Judged groups in the order of their problems, before all other work.

        `on_judged` gets each as soon as it is judged, in a thread. It may be slow.
        """
        assert self.client is not None, "connect() comes first"
        self.client.check_prompts(problems)
        done = itertools.count(1)

        async def group(problem: Problem, seed: int) -> Group:
            judged = await self.judged(Work(problem, samples, sampling, seed), first=True)
            if on_judged is not None:
                await asyncio.to_thread(on_judged, judged)
            progress(next(done), len(problems), "groups")
            return judged

        return await all_of(group(problem, seed) for problem, seed in zip(problems, seeds, strict=True))

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

    def seed_of(self, purpose: Literal["train", "validation"], number: int) -> int:
        """The seed of a request of this run."""
        return request_seed(self.config.run.seed, purpose, number)
