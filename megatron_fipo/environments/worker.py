"""The child process in which environments run: makes them, hands calls on, and holds answers to what they may be.

    python -m megatron_fipo.environments.worker SOCKET_FD NAME OPTIONS_JSON MODEL_DIR VOCAB_SIZE

With an empty MODEL_DIR it only imports the function, and answers nothing.

An item is {call, episode, …}; the answer has the state of the episode's environment after it. `reset` {task} gives
{context, state}; `restore` {task, state} gives {}; `step` {action} gives {context, state} or {verdict, state}, a null
verdict where reward.rule judges; `close` gives {}. Where the environment raised, it is {error, traceback}.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from megatron_fipo.config.environment import NAME_KEY
from megatron_fipo.config.loop import VERIFIER_MEMORY_GIB
from megatron_fipo.data.tokenizers import Tokenizer, load_tokenizer
from megatron_fipo.environments.protocol import Action, Done, Environment, More, Task
from megatron_fipo.plugins import check_call, load_function
from megatron_fipo.processes import worker_child
from megatron_fipo.rewards.own import BadReward, verdict_of

METHODS = ("reset", "step", "state", "restore", "close")


class BadAnswer(Exception):
    """What an environment answered is none. Says what would be right."""


class Environments:
    """Those of the samples that this process has, by the number of the sample's episode."""

    def __init__(self, make: Callable[[], Environment], decode: Callable[[list[int]], str], vocab_size: int):
        self._make, self._decode, self._vocab_size = make, decode, vocab_size
        self._open: dict[int, Environment] = {}

    def answer(self, item: dict[str, Any]) -> dict[str, Any]:
        """One item's answer."""
        try:
            return getattr(self, f"_{item['call']}")(item)
        except (BadAnswer, BadReward) as error:
            return {"error": str(error)}
        except (Exception, SystemExit) as error:
            return worker_child.raised(error, (__file__,))

    def _reset(self, item: dict[str, Any]) -> dict[str, Any]:
        environment = self._new(item)
        context = self._ids(environment.reset(Task(**item["task"])), "reset")
        return {"context": context, "state": _state(environment)}

    def _restore(self, item: dict[str, Any]) -> dict[str, Any]:
        self._new(item).restore(Task(**item["task"]), item["state"])
        return {}

    def _step(self, item: dict[str, Any]) -> dict[str, Any]:
        environment = self._open[item["episode"]]
        action = item["action"]
        found = environment.step(Action(text=self._decode(action["token_ids"]), **action))
        if isinstance(found, More):
            context = self._ids(found.token_ids, "More")
            if not context:
                raise BadAnswer("More has no token; Done ends a sample")
            return {"context": context, "state": _state(environment)}
        if isinstance(found, Done):
            verdict = None if found.reward is None else dataclasses.asdict(verdict_of(found.reward))
            return {"verdict": verdict, "state": None}
        raise BadAnswer(f"step returned {type(found).__name__}; More or Done is right")

    def _close(self, item: dict[str, Any]) -> dict[str, Any]:
        environment = self._open.pop(item["episode"], None)
        if environment is not None:
            environment.close()
        return {}

    def _new(self, item: dict[str, Any]) -> Environment:
        environment = self._make()
        lacking = [name for name in METHODS if not callable(getattr(environment, name, None))]
        if lacking:
            raise BadAnswer(
                f"{type(environment).__name__} has no {', '.join(lacking)}; docs/environments.md has an example"
            )
        self._open[item["episode"]] = environment
        return environment

    def _ids(self, found: Sequence[Any], where: str) -> list[int]:
        ids = [int(each) for each in found]
        wrong = next((each for each in ids if not 0 <= each < self._vocab_size), None)
        if wrong is not None:
            raise BadAnswer(f"{where} has the token id {wrong}; those of the model are 0 to {self._vocab_size - 1}")
        return ids


def _state(environment: Environment) -> dict[str, Any] | None:
    state = environment.state()
    if state is not None and not isinstance(state, dict):
        raise BadAnswer(f"state returned {type(state).__name__}; a dict, or None, is right")
    try:
        json.dumps(state)
    except (TypeError, ValueError) as error:
        raise BadAnswer(f"state returned what JSON cannot hold: {error}") from None
    return state


def _prepare(
    name: str, options: dict[str, Any], model_dir: str, vocab_size: int
) -> tuple[dict[str, Any], worker_child.Answer]:
    """The greeting, and what answers. Raises ConfigError."""
    function = load_function(name, NAME_KEY)
    check_call(function, 1, options, name, NAME_KEY)
    if not model_dir:
        return {}, lambda item: {"error": "started without a model"}
    tokenizer: Tokenizer = load_tokenizer(model_dir)
    environments = Environments(partial(function, tokenizer, **options), tokenizer.decode, vocab_size)
    return {}, environments.answer


def main() -> None:
    """Entry point; the file descriptor is inherited from the parent."""
    descriptor, name, options, model_dir, vocab_size = sys.argv[1:]
    prepare = partial(_prepare, name, json.loads(options), model_dir, int(vocab_size))
    worker_child.run(int(descriptor), VERIFIER_MEMORY_GIB << 30, prepare)


if __name__ == "__main__":
    main()
