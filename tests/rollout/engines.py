"""Tiny random models and real vLLM servers for tests: what tests/rollout and tests/weights/test_transfer.py share."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import psutil
import torch
import transformers

from megatron_fipo.config import RolloutConfig
from megatron_fipo.engines.pool import EnginePool
from megatron_fipo.engines.states import State
from megatron_fipo.errors import RolloutError
from megatron_fipo.records.problem import Problem, prompt_ids
from megatron_fipo.records.sample import Group, Sample
from megatron_fipo.records.streams import ROLLOUT_LOG_PROBS
from megatron_fipo.rollout.generator import EngineGenerator
from megatron_fipo.rollout.ongoing import Ongoing
from megatron_fipo.rollout.work import Sampling

VOCABULARY = 96
CACHED_PROMPT = 160
"""Prompt tokens that a prefix cache holds some of: more than the 128 of one cache block of vLLM on a CPU."""
STOP_TOKEN = 2
MAX_PROMPT, MAX_RESPONSE = 192, 32


def save_tiny_model(
    directory: Path, seed: int, *, tied: bool = False, kind: str = "Qwen2", **settings: Any
) -> transformers.PreTrainedModel:
    """A random fp32 model of 2 layers, saved and returned; 32 is the smallest head that vLLM's CPU attention takes."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": STOP_TOKEN,
        # Wide enough that two models disagree by whole nats.
        "initializer_range": 0.2,
    }
    config = getattr(transformers, f"{kind}Config")(tie_word_embeddings=tied, **sizes | settings)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).float().eval()
    model.save_pretrained(directory)
    return model


def rollout_config(**changes: Any) -> RolloutConfig:
    """Settings of a test's server: fp32, eager, deadlines that a busy machine keeps."""
    settings: dict[str, Any] = {
        "dtype": "float32",
        "max_prompt_length": MAX_PROMPT,
        "max_response_length": MAX_RESPONSE,
        "max_num_seqs": 32,
        "enforce_eager": True,
        "bucket_mib": 1,
        "start_timeout_s": 400.0,
        "request_timeout_s": 120.0,
        "update_timeout_s": 60.0,
    }
    return RolloutConfig(**settings | changes)


def problems(count: int, length: int = 12) -> list[Problem]:
    """Random prompts of `length` tokens that share no prefix."""
    generator = torch.Generator().manual_seed(count)
    prompts = torch.randint(3, VOCABULARY, (count, length), generator=generator).tolist()
    return [Problem(f"problem-{index}", "", prompt_ids(prompt), "", "test") for index, prompt in enumerate(prompts)]


def sampling(**changes: Any) -> Sampling:
    """Plain sampling at temperature 1."""
    settings: dict[str, Any] = {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": -1,
        "max_tokens": 24,
        "stop_token_ids": [STOP_TOKEN],
    }
    return Sampling(**settings | changes)


def serving_pool(addresses: list[str], directory: Path, **settings: Any) -> EnginePool:
    """A pool of servers elsewhere that count as serving, unasked; `settings` are EnginePool's and RolloutConfig's."""
    warn = settings.pop("warn", lambda _: None)
    pool = EnginePool(rollout_config(addresses=addresses, **settings), directory, directory, seed=0, warn=warn)
    for server in pool.servers:
        server.enter(State.SERVING)
    return pool


def generate(
    client: EngineGenerator, *asked: Any, supply: Callable[[], None] | None = None, **more: Any
) -> list[Group]:
    """What `client.generate` samples in the end. `supply` brings servers back when none is left; without it that ends.

    Raises:
        RolloutError: as `client.generate`, or no server is left.
    """

    def give_up() -> None:
        raise RolloutError(f"no vLLM server is left: {client._pool.losses_in_words()}")

    return Ongoing(client, client.generate(*asked, **more)).to_the_end(supply or give_up)


def forward_log_probs(model: transformers.PreTrainedModel, prompt: numpy.ndarray, sample: Sample) -> torch.Tensor:
    """transformers' own log-probs of a sample: fp32 [response length]."""
    tokens = torch.from_numpy(numpy.concatenate([prompt, sample.token_ids]))[None].long()
    with torch.no_grad():
        log_probs = model(tokens).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return log_probs.gather(1, tokens[0, len(prompt) :, None])[:, 0]


def log_prob_error(model: transformers.PreTrainedModel, prompt: numpy.ndarray, sample: Sample) -> float:
    """Largest difference between the engine's log-probs of a sample and transformers'."""
    return float(
        (forward_log_probs(model, prompt, sample) - torch.tensor(sample.streams[ROLLOUT_LOG_PROBS])).abs().max()
    )


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Polls; AssertionError naming `what` when it has not come after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.05)


def running(process: psutil.Process) -> bool:
    """Whether it runs: neither gone nor a zombie that nobody has waited for."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
