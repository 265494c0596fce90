"""Batches that sampling offers to the trainer: rows for every rank, tokens in a store for who reads them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType

from megatron_fipo.algorithm.advantages import group_advantages
from megatron_fipo.config import AlgorithmConfig
from megatron_fipo.records.rows import TrainBatch, rows_of, told_stretches
from megatron_fipo.records.sample import Group
from megatron_fipo.rollout.store import SampleStore
from megatron_fipo.rollout.store_server import StoreServer


class Offers:
    """Offers batches, and serves their tokens until they are settled. A context manager, which ends that."""

    def __init__(self, algorithm: AlgorithmConfig, warn: Callable[[str], None]):
        self._algorithm, self._warn = algorithm, warn
        self._store = SampleStore()
        self._offered: TrainBatch | None = None
        self._servers = [StoreServer(self._store)]

    def __enter__(self) -> "Offers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Serve no more."""
        self._servers[-1].close()

    @property
    def offered(self) -> TrainBatch:
        """The batch that was offered last."""
        assert self._offered is not None, "a batch is offered first"
        return self._offered

    def offer(
        self, groups: Sequence[Group], step: int, weight_version: int, recorded_rows: Sequence[int] = ()
    ) -> bytes:
        """Judged groups as a batch of `step`, which starts from the weights of `weight_version`: its frame."""
        self._offered = train_batch(groups, self._algorithm, self._store, step, weight_version, recorded_rows)
        return self._frame()

    def give_back(self, reason: str) -> bytes:
        """The batch anew, served by another server: ranks could not fetch it from the one before, for this reason."""
        self._warn(f"step {self.offered.step}: the batch's tokens are served anew: {reason}")
        self._servers[-1].close()
        self._servers.append(StoreServer(self._store))
        return self._frame()

    def fetched(self) -> None:
        """Every rank has what it reads of the batch: its tokens need not be here any more."""
        self._store.drop(self.offered.rows["sample"].tolist())

    def _frame(self) -> bytes:
        return replace(self.offered, store=self._servers[-1].address).to_bytes()


def train_batch(
    groups: Sequence[Group],
    algorithm: AlgorithmConfig,
    store: SampleStore,
    step: int,
    weight_version: int,
    recorded_rows: Sequence[int] = (),
) -> TrainBatch:
    """Judged groups as rows, cut into mini-batches of whole groups, each sample with its advantage; tokens to `store`.

    A sample whose check failed is no wrong answer: it is left out, of the group's mean too. The values per token of
    `recorded_rows` are written to a file.
    """
    samples: list[int] = []
    tokens: list[int] = []
    prompts: list[int] = []
    advantages: list[float] = []
    weight_lag: list[int] = []
    sizes: list[int] = []
    told: list[tuple[int, int, int]] = []
    for start in range(0, len(groups), algorithm.mini_batch_prompts):
        before = len(samples)
        for group in groups[start : start + algorithm.mini_batch_prompts]:
            pairs = zip(group.samples, group.results, strict=True)
            judged = [(sample, result) for sample, result in pairs if result.was_judged]
            prompt = len(group.problem.token_ids)
            for row, (sample, _) in enumerate(judged, start=len(samples)):
                told += [(row, prompt + segment.start, prompt + segment.end) for segment in sample.told]
            samples += [store.put(group.problem.token_ids, sample.streams) for sample, _ in judged]
            tokens += [prompt + len(sample) for sample, _ in judged]
            prompts += [prompt] * len(judged)
            weight_lag += [weight_version - sample.weight_version for sample, _ in judged]
            rewards = [result.reward for _, result in judged]
            advantages += group_advantages(rewards, norm_by_std=algorithm.norm_adv_by_std)
        if len(samples) > before:
            sizes.append(len(samples) - before)
    recorded = [samples[row] for row in recorded_rows]
    rows = rows_of(samples, tokens, prompts, advantages, weight_lag, sizes, recorded)
    return TrainBatch(step, rows, told_stretches(told, rows))
