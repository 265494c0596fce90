"""A store in a process of its own, for tests that end or stop one: prints its address, ends with its standard input.

python -m tests.rollout.store_process SAMPLES TOKENS: sample i has so many tokens, which are all i.
"""

import sys

import msgspec
import numpy

from megatron_fipo.rollout.store import SampleStore
from megatron_fipo.rollout.store_server import StoreServer


def main() -> None:
    samples, tokens = map(int, sys.argv[1:])
    store = SampleStore()
    for sample in range(samples):
        ids = numpy.full(tokens, sample, numpy.int32)
        store.put(ids[:1], {"token_ids": ids[1:], "rollout_log_probs": numpy.zeros(tokens - 1, numpy.float32)})
    print(msgspec.json.encode(StoreServer(store).address).decode(), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
