"""Answers of made-up servers to a request for samples: a good one, and wrong ones with what is said of them."""

import json
from collections.abc import Callable
from typing import Any

import numpy

from megatron_fipo.engines.generate_messages import EndFrame, GenerateRequest
from megatron_fipo.records.wire import encode_frame
from tests.rollout.engines import STOP_TOKEN, VOCABULARY

VERSION = 3
Server = Callable[[GenerateRequest], list[bytes]]


def sample(index: int, /, **changes: Any) -> bytes:
    """A good response of three tokens, with changes."""
    about = {
        "type": "sample",
        "index": index,
        "start": 0,
        "finish_reason": "stop",
        "spans": [[str(VERSION), 0, 3]],
    }
    arrays = {
        "token_ids": numpy.array([5, 7, STOP_TOKEN], numpy.int32),
        "rollout_log_probs": numpy.array([-1.0, -0.5, -0.25], numpy.float32),
    }
    arrays |= {name: changes.pop(name) for name in list(changes) if isinstance(changes[name], numpy.ndarray)}
    return encode_frame(about | changes, {name: array for name, array in arrays.items() if array.size != 77})


def part(index: int, /, **changes: Any) -> bytes:
    """Two tokens of a response that goes on, with changes."""
    about = {"type": "part", "index": index, "start": 0}
    arrays = {"token_ids": ints(5, 7), "rollout_log_probs": floats(-1, -0.5)}
    arrays |= {name: changes.pop(name) for name in list(changes) if isinstance(changes[name], numpy.ndarray)}
    return encode_frame(about | changes, arrays)


def good(request: GenerateRequest) -> list[bytes]:
    return [*(sample(index) for index in range(len(request.seeds))), encode_frame(EndFrame(len(request.seeds)))]


def with_first(**changes: Any) -> Server:
    """All is well but the first response."""
    return lambda request: [sample(0, **changes), *good(request)[1:]]


def floats(*values: float) -> numpy.ndarray:
    with numpy.errstate(over="ignore"):
        return numpy.array(values, numpy.float64).astype(numpy.float32)


def ints(*values: int) -> numpy.ndarray:
    return numpy.array(values, numpy.int32)


MISSING = numpy.zeros(77, numpy.int32)
WRONG: dict[str, tuple[Server, str]] = {
    "an index twice": (lambda r: [sample(0), sample(0), encode_frame(EndFrame(2))], "response 0 came twice"),
    "an index beyond": (with_first(index=2), "there is a response 2, and 2 were asked for"),
    "a negative index": (with_first(index=-1), "there is a response -1"),
    "an index that is no integer": (with_first(index=0.5), "Expected `int`, got `float`"),
    "no index": (
        lambda r: [encode_frame({"type": "sample", "finish_reason": "stop", "spans": []})],
        "missing required",
    ),
    "no tokens": (with_first(token_ids=ints(), rollout_log_probs=floats()), "has 0 tokens; 1 to 24 were asked for"),
    "too many tokens": (with_first(token_ids=ints(*[5] * 25), rollout_log_probs=floats(*[-1] * 25)), "has 25 tokens"),
    "a token id of -1": (with_first(token_ids=ints(5, -1, STOP_TOKEN)), "the token id -1, which is none"),
    "a token id of 10^9": (with_first(token_ids=ints(5, 10**9, STOP_TOKEN)), f"1000000000.*the model's {VOCABULARY}"),
    "the first token id beyond": (with_first(token_ids=ints(5, VOCABULARY, STOP_TOKEN)), "the token id 96"),
    "token ids of 64 bits": (with_first(token_ids=numpy.array([5, 7, 2])), "token_ids as int64 .* should have int32"),
    "token ids of 3.5": (with_first(token_ids=floats(5, 3.5, 2)), "token_ids as float32"),
    "token ids in two dimensions": (with_first(token_ids=ints(5, 7, 2)[None]), r"token_ids as int32 \[1, 3\]"),
    "no token ids": (
        with_first(token_ids=MISSING),
        "the streams rollout_log_probs, and should have token_ids, rollout_log_probs",
    ),
    "no log-probs": (
        with_first(rollout_log_probs=MISSING.astype(numpy.float32)),
        "the streams token_ids, and should have token_ids, rollout_log_probs",
    ),
    "another array": (with_first(ranks=ints(1)), "the streams ranks, rollout_log_probs, token_ids, and"),
    "too few log-probs": (with_first(rollout_log_probs=floats(-1, -1)), "3 token_ids, 2 rollout_log_probs"),
    "log-probs of bytes": (with_first(rollout_log_probs=numpy.zeros(3, numpy.uint8)), "rollout_log_probs as uint8"),
    "a log-prob of +7": (with_first(rollout_log_probs=floats(-1, 7, -1)), "log-probs from -1 to 7"),
    "a log-prob of -1e300": (with_first(rollout_log_probs=floats(-1, -1e300, -1)), "not finite"),
    "a log-prob of -1e30": (with_first(rollout_log_probs=floats(-1, -1e30, -1)), "log-probs from -1e\\+30 to -1"),
    "a log-prob of nan": (with_first(rollout_log_probs=floats(-1, float("nan"), -1)), "not finite"),
    "an aborted response": (with_first(finish_reason="abort"), "'abort' instead of stop or length"),
    "a finish reason of none": (with_first(finish_reason=None), "Expected `str`, got `null`"),
    "a stop without a stop token": (with_first(token_ids=ints(5, 7, 9)), "stopped with the token 9"),
    "an early cut": (with_first(finish_reason="length"), "cut off at 3 tokens; 24 were asked for"),
    "another version": (with_first(spans=[["2", 0, 3]]), "sampled by weights 2; 3 are in service"),
    "a version of a fresh server": (with_first(spans=[["default", 0, 3]]), "should be an integer"),
    "a version that is a number": (with_first(spans=[[3, 0, 3]]), "Expected `str`, got `int`"),
    "no versions": (with_first(spans=[]), r"weight versions \[\]"),
    "versions with a gap": (with_first(spans=[["3", 0, 1], ["3", 2, 3]]), "not of its tokens 0 to 3"),
    "versions that end early": (with_first(spans=[["3", 0, 2]]), "not of its tokens 0 to 3"),
    "versions beyond": (with_first(spans=[["3", 0, 4]]), "not of its tokens 0 to 3"),
    "an empty span": (with_first(spans=[["3", 0, 0], ["3", 0, 3]]), "not of its tokens 0 to 3"),
    "a beginning that is missing": (with_first(start=2), "goes on at token 2; 0 have come"),
    "a part that is missing": (
        lambda r: [part(0), part(0, start=3), *good(r)],
        "response 0 goes on at token 3; 2 have come",
    ),
    "a part twice": (lambda r: [part(0), part(0), *good(r)], "goes on at token 0; 2 have come"),
    "a part after the end": (lambda r: [sample(0), part(0, start=3), *good(r)[1:]], "response 0 came twice"),
    "a part of another": (lambda r: [part(2), *good(r)], "there is a response 2"),
    "a part without tokens": (
        lambda r: [part(0, token_ids=ints(), rollout_log_probs=floats()), *good(r)],
        "has 0 tokens; 1 to 24",
    ),
    "a part with a log-prob of +7": (lambda r: [part(0, rollout_log_probs=floats(-1, 7)), *good(r)], "from -1 to 7"),
    "parts without an end": (
        lambda r: [part(0, token_ids=ints(*[5] * 24), rollout_log_probs=floats(*[-1] * 24)), *good(r)],
        "goes on after 24 tokens; no more were asked for",
    ),
    "an end that is too long": (
        lambda r: [
            part(0, token_ids=ints(*[5] * 22), rollout_log_probs=floats(*[-1] * 22)),
            sample(0, start=22, spans=[["3", 0, 25]]),
            *good(r)[1:],
        ],
        "has 3 tokens; 1 to 2 were asked for",
    ),
    "versions of the last part alone": (
        lambda r: [part(0), sample(0, start=2), *good(r)[1:]],
        "not of its tokens 0 to 5",
    ),
    "a field that was not agreed": (with_first(text="seven"), "unknown field `text`"),
    "a frame of another kind": (lambda r: [encode_frame({"type": "hello"})], "Invalid value 'hello'"),
    "a frame about nothing": (lambda r: [encode_frame(7)], "Expected `object`, got `int`"),
    "no end": (lambda r: good(r)[:-1], "ended after 2 of 2 responses"),
    "an early end": (lambda r: [sample(0), encode_frame(EndFrame(2))], "1 responses came of the 2 .* 2 were asked"),
    "an end that counts wrong": (lambda r: [*good(r)[:-1], encode_frame(EndFrame(3))], "2 responses came of the 3"),
    "nothing": (lambda r: [], "ended after 0 of 2 responses"),
    "JSON": (lambda r: [json.dumps({"choices": []}).encode()], "into a frame"),
    "half a frame": (lambda r: [good(r)[0][:-3]], "bytes into a frame"),
}
