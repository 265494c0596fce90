"""Why: weights may change while an engine is in the middle of a response. Each token's log-prob then has to be that of
the weights which the response's spans name, or importance weights are taken of a policy that never sampled it.

One real vLLM server on the CPU in fp32, and two unrelated random models, so that every mix-up is off by whole nats.
transformers is the oracle, with the keys and values that the engine should have at each token. Does not cover tensor
parallelism in the server, nor GPUs.
"""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import msgspec
import numpy
import pytest
import torch
from torch.distributed import TCPStore
from transformers import DynamicCache, Qwen2ForCausalLM

from megatron_fipo.engines.control import EngineControl
from megatron_fipo.engines.generate_messages import (
    GENERATE_PATH,
    EndFrame,
    GenerateRequest,
    SampleFrame,
    VersionSpan,
    read_about,
)
from megatron_fipo.engines.pool import EnginePool
from megatron_fipo.engines.use_messages import USE_PATH, CacheUse
from megatron_fipo.records.streams import ROLLOUT_LOG_PROBS, TOKEN_IDS
from megatron_fipo.records.wire import FrameReader
from megatron_fipo.weights.local_senders import Senders
from megatron_fipo.weights.publisher import WeightPublisher
from megatron_fipo.weights.transports import make_transport
from tests.rollout.engines import CACHED_PROMPT, problems, rollout_config, save_tiny_model
from tests.weights.whole import WholeWeights

pytestmark = pytest.mark.slow

SAMPLES, TOKENS = 8, 700
PROMPT = problems(1, length=CACHED_PROMPT)[0].token_ids.tolist()


@dataclass(frozen=True)
class Answer:
    """One response as it came over the wire."""

    token_ids: list[int]
    log_probs: torch.Tensor
    spans: list[VersionSpan]


@dataclass
class Engine:
    """A real server, and both models that it may hold; version 0 is the first."""

    pool: EnginePool
    publisher: WeightPublisher
    models: list[Qwen2ForCausalLM]

    def ask(self, salt: str, tokens: int, samples: int = 1) -> list[Answer]:
        """Responses of exactly so many tokens."""
        request = GenerateRequest(
            PROMPT, list(range(samples)), 1.0, 1.0, -1, tokens, [], salt, [[]] * samples, stream_tokens=10_000
        )
        reader, answers = FrameReader(), []
        with httpx.stream(
            "POST",
            self.pool.servers[0].url + GENERATE_PATH,
            content=msgspec.json.encode(request),
            headers=self.pool.headers,
            timeout=120,
            trust_env=False,
        ) as response:
            for chunk in response.iter_raw():
                for frame in reader.feed(chunk):
                    about = read_about(frame.about)
                    if isinstance(about, EndFrame):
                        continue
                    assert isinstance(about, SampleFrame), about
                    log_probs = torch.from_numpy(numpy.array(frame.arrays[ROLLOUT_LOG_PROBS]))
                    answers.append(Answer(frame.arrays[TOKEN_IDS].tolist(), log_probs, about.spans))
        assert [len(answer.token_ids) for answer in answers] == [tokens] * samples
        return answers

    def preemptions(self) -> int:
        """All that the engine counts."""
        answer = httpx.post(self.pool.servers[0].url + USE_PATH, headers=self.pool.headers, timeout=60, trust_env=False)
        return msgspec.json.decode(answer.raise_for_status().content, type=CacheUse).preemptions

    def publish(self, version: int) -> None:
        """Hand the engine the model of this version: the first if it is even, else the second."""
        self.publisher.publish({0: WholeWeights(list(self.models[version % 2].state_dict().items()))}, version)

    def answers_across(self, version: int) -> list[Answer]:
        """Responses in whose middle the weights of `version` came."""
        for attempt, wait_s in enumerate((0.3, 0.6, 1.2, 0.1, 2.4)):
            found: list[Answer] = []
            salt = f"weights-{version - 1}-{attempt}"
            asking = threading.Thread(target=lambda: found.extend(self.ask(salt, TOKENS, SAMPLES)))  # noqa: B023
            asking.start()
            time.sleep(wait_s)
            self.publish(version)
            asking.join(timeout=120)
            if found and all(len(answer.spans) == 2 for answer in found):
                return found
            self.publish(version - 1)  # all of them came before or after
        pytest.fail(f"no update came in the middle of all {SAMPLES} responses")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    directory: Path = tmp_path_factory.mktemp("in-flight")
    # No end of sequence: every response is as long as it may be.
    sizes = {"max_position_embeddings": 1024, "eos_token_id": None}
    models = [save_tiny_model(directory / f"{seed}", seed, **sizes) for seed in range(2)]
    config = rollout_config(weight_transfer="shared_memory", max_response_length=TOKENS)
    with EnginePool(config, directory / "0", directory / "run", seed=0) as pool:
        pool.start()
        pool.wait_ready()
        publisher = WeightPublisher(
            {0: make_transport(config, 0, directory / "run")},
            EngineControl(pool),
            TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False),
            senders=Senders(1),
            timeout_s=60.0,
            begin_timeout_s=60.0,
        )
        yield Engine(pool, publisher, models)
        publisher.close()


def expected(
    before: Qwen2ForCausalLM, after: Qwen2ForCausalLM, answer: Answer, cut: int, *, keep: bool
) -> torch.Tensor:
    """log-probs of a response whose first `cut` tokens `before` sampled: [tokens] fp32.

    With `keep` the weights of `after` read the keys and values that those of `before` left behind: of the prompt and of
    all tokens before the cut but the last, which no forward pass had taken in yet.
    """
    tokens = torch.tensor([PROMPT + answer.token_ids])
    border = len(PROMPT) + cut - 1
    with torch.no_grad():
        cache = DynamicCache()
        first = before(tokens[:, :border], past_key_values=cache).logits[0, len(PROMPT) - 1 :]
        if keep:
            second = after(tokens[:, border:-1], past_key_values=cache).logits[0]
        else:
            second = after(tokens[:, :-1]).logits[0, border:]
    logits = torch.cat([first, second])
    return logits.log_softmax(-1).gather(1, tokens[0, len(PROMPT) :, None])[:, 0]


@pytest.mark.parametrize("kv_on_update", ["recompute", "keep"])
def test_an_update_comes_in_the_middle_of_responses(
    engine: Engine, kv_on_update: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = kv_on_update == "keep"
    first = 10 if keep else 0
    monkeypatch.setattr(engine.pool.config, "kv_on_update", kv_on_update)
    engine.publish(first)
    before, after = engine.models
    for answer in engine.answers_across(first + 1):
        old, new = answer.spans
        assert [int(span.version) - first for span in answer.spans] == [0, 1]
        assert (old.start, old.end, new.end) == (0, new.start, TOKENS)
        cut = old.end
        found = {
            kept: (expected(before, after, answer, cut, keep=kept) - answer.log_probs).abs() for kept in (True, False)
        }
        assert found[keep].max() < 1e-4, (cut, found[keep][:cut].max(), found[keep][cut:].max())
        # Negative controls: the other treatment of keys and values, and a cut that is off by one token.
        assert found[not keep][cut:].max() > 0.1
        for off in (cut - 1, cut + 1):
            assert (expected(before, after, answer, off, keep=keep) - answer.log_probs).abs().max() > 0.01
    assert engine.preemptions() == 0, "what an update has computed again is not for lack of memory"


def test_a_salt_per_version_keeps_prefixes_of_older_weights_away(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: with the salt of the version before the log-probs are those of no model."""
    monkeypatch.setattr(engine.pool.config, "kv_on_update", "keep")
    engine.publish(20)
    engine.ask("weights-20", 8)
    engine.publish(21)

    def error(salt: str) -> float:
        (answer,) = engine.ask(salt, 8)
        assert [span.version for span in answer.spans] == ["21"]
        new = engine.models[1]
        return float((expected(new, new, answer, 1, keep=False) - answer.log_probs).abs().max())

    assert error("weights-21") < 1e-4
    assert error("weights-20") > 0.1
    # For who asks by vLLM's own routes, without a salt: recompute leaves no prefix behind.
    monkeypatch.setattr(engine.pool.config, "kv_on_update", "recompute")
    engine.publish(21)
    assert error("weights-20") < 1e-4
