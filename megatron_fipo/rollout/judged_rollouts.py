"""Problems in, judged groups out: a tokenizer, the servers and the verifiers, by which training samples its
steps and validations, and `evaluate` everything.

Rewards are judged while other groups are still being sampled. Everything random is a function of (run.seed, what is
drawn), so a run that is repeated, or resumed, asks for the same samples. Imports neither torch nor Megatron-Core.
"""

from collections.abc import Callable
from concurrent.futures import Future
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
from megatron_fipo.rollout.episode import generate_in_turns, surroundings
from megatron_fipo.rollout.events import Steps
from megatron_fipo.rollout.generator import EngineGenerator, connections
from megatron_fipo.rollout.listener import Progress
from megatron_fipo.rollout.seeds import request_seed
from megatron_fipo.rollout.work import Sampling


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
    ):
        """See that rewards can be had, and start servers without waiting for them.

        Args:
            tokenizer: `tokenizer_of` the model.
            directory: for the run's files.
            fewest_samples: no problem will have fewer samples.

        Raises:
            ConfigError, RewardError: as RewardPool.wait_started; as EnvironmentPool.wait_started.
            RolloutError: so many connections to servers may not be opened.
        """
        self.config, self.tokenizer, self.pool = config, tokenizer, pool
        self.vocab_size = read_architecture(model_dir).vocab_size
        self.client: EngineGenerator | None = None
        self.environments: EnvironmentPool | None = None
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
        self.client = EngineGenerator(self.pool, self.vocab_size)
        return self.client

    def sample(
        self,
        problems: list[Problem],
        samples: int,
        sampling: Sampling,
        seeds: list[int],
        progress: Progress,
        on_judged: Callable[[Group], None] | None = None,
    ) -> Steps[list[Future[Group]]]:
        """Groups that are being judged, in the order of their problems; all of them are sampled.

        A future gives its group when it is judged and `on_judged`, called in a verifier's thread, has returned.
        """
        assert self.client is not None, "connect() comes first"
        judged: dict[int, Future[Group]] = {}

        def judge(group: Group) -> None:
            future = self.verifiers.submit(group, self.tokenizer.decode)
            # By the object, which `generate` returns too: two groups may be of one problem.
            judged[id(group)] = future if on_judged is None else _after(future, on_judged)
            progress(len(judged), len(problems), "groups")

        # Nobody may have asked for a long time.
        self.pool.lose_unfit()
        asked = (problems, samples, sampling, seeds, judge)
        if self.environments is None:
            groups = yield from self.client.generate(*asked)
        else:
            around = surroundings(self.config, self.environments, self.tokenizer.decode, self.verifiers.failures)
            groups = yield from generate_in_turns(self.client, around, *asked)
        return [judged[id(group)] for group in groups]

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
