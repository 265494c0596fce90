"""Rollout servers without a model. They answer on the route of the real servers, and take a given time per token.

python -m benchmarks.fake_engines PORTS PLACES SECONDS_PER_TOKEN; prints the ports, and ends with its standard input.

A prompt's first two numbers are the mean and the cap of its lengths. The length of a response is a function of its
seed. At 0 seconds per token everything is answered at once.
"""

import asyncio
import functools
import itertools
import json
import sys
from typing import Any

import msgspec
import numpy

from megatron_fipo.engines.generate_messages import (
    EndFrame,
    GenerateRequest,
    PartFrame,
    SampleFrame,
    VersionSpan,
    sample_frame,
)
from megatron_fipo.records.wire import encode_frame

STOP_TOKEN, VOCABULARY = 2, 152_064
ABOUT = b'{"world_size": 1, "weight_version": "0", "results": [{"machine": "here"}]}'
"""A server's answer to every request about itself."""


def length_of(seed: int, mean: int, cap: int) -> int:
    """Return a log-normal length with this mean, or `mean` itself if it equals the cap."""
    if mean == cap:
        return mean
    drawn = numpy.random.default_rng(seed).lognormal(numpy.log(mean) - 0.5, 1.0)
    return int(min(max(drawn, 1), cap))


@functools.cache
def tokens(length: int) -> tuple[list[int], list[float]]:
    """Return random tokens that end with a stop token, and their log-probs."""
    drawn = numpy.random.default_rng(length)
    token_ids = [*drawn.integers(3, VOCABULARY, length - 1).tolist(), STOP_TOKEN]
    return token_ids, (-drawn.exponential(size=length)).astype(numpy.float32).tolist()


@functools.lru_cache(maxsize=64)
def frames_of(length: int, index: int, stream_tokens: int) -> list[bytes]:
    """Return the frames of a response as the real route sends them."""
    token_ids, log_probs = tokens(length)
    cuts = [0, *range(stream_tokens + 1, length, stream_tokens), length]
    frames = []
    for start, end in itertools.pairwise(cuts):
        about: PartFrame | SampleFrame = PartFrame(index, start)
        if end == length:
            about = SampleFrame(index, start, "stop", [VersionSpan("0", 0, length)])
        frames.append(sample_frame(about, token_ids[start:end], log_probs[start:end]))
    return frames


@functools.lru_cache(maxsize=4)
def json_of(length: int, samples: int) -> bytes:
    """Return an answer as on vLLM's own route: a whole group in JSON."""
    token_ids, log_probs = tokens(length)
    pairs = zip(token_ids, log_probs, strict=True)
    content: list[dict[str, Any]] = [
        {"token": f"token_id:{token}", "logprob": log_prob, "bytes": None, "top_logprobs": [], "token_id": token}
        for token, log_prob in pairs
    ]
    choice = {
        "logprobs": {"content": content},
        "finish_reason": "stop",
        "token_ids": token_ids,
        "weight_versions": [{"version": "0", "start": 0, "end": length}],
    }
    return json.dumps({"choices": [choice | {"index": index} for index in range(samples)]}).encode()


class Engine:
    """One server."""

    def __init__(self, places: int, seconds_per_token: float):
        self._places = asyncio.Semaphore(places)
        self._seconds_per_token = seconds_per_token

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection."""
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.decode("latin-1").lower().split("\r\n")
                size = next((int(line[15:]) for line in lines if line.startswith("content-length:")), 0)
                body = await reader.readexactly(size)
                if "/fipo/generate" in lines[0]:
                    await self._generate(msgspec.json.decode(body, type=GenerateRequest), writer)
                elif "/inference/v1/generate" in lines[0]:
                    asked = json.loads(body)
                    answer = json_of(asked["token_ids"][0], asked["sampling_params"]["n"])
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(answer))
                    writer.write(answer)
                else:
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(ABOUT) + ABOUT)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def _generate(self, request: GenerateRequest, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        mean, cap = request.token_ids[:2]

        async def sample(index: int, seed: int) -> None:
            length = length_of(seed, mean, cap)
            if self._seconds_per_token:
                async with self._places:
                    await asyncio.sleep(length * self._seconds_per_token)
            # A timed table measures how long places are in use, not bytes, so one token is sent for all.
            kept = 1 if self._seconds_per_token else length
            for frame in frames_of(kept, index, request.stream_tokens):
                _chunk(writer, frame)
                await writer.drain()

        await asyncio.gather(*(sample(index, seed) for index, seed in enumerate(request.seeds)))
        _chunk(writer, encode_frame(EndFrame(len(request.seeds))))
        writer.write(b"0\r\n\r\n")


def _chunk(writer: asyncio.StreamWriter, body: bytes) -> None:
    writer.write(b"%x\r\n" % len(body) + body + b"\r\n")


async def main() -> None:
    """Serve until standard input ends."""
    ports, places, seconds_per_token = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    servers = [
        await asyncio.start_server(Engine(places, seconds_per_token).serve, "127.0.0.1", 0) for _ in range(ports)
    ]
    print(*(server.sockets[0].getsockname()[1] for server in servers), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main())
