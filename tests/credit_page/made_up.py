"""Made-up records of responses whose values are as noisy as real ones."""

from typing import Any

import numpy

from megatron_fipo.records.credit import CLIPPED, COUNTS, PRODUCED, TAKES_PART, VALUES, TokenCredit
from megatron_fipo.tracking.credit_file import CreditAbout, CreditResponse

GAMMA = 2.0 ** (-1 / 32)
BAND = (0.8, 1.2)
ABOUT = CreditAbout(step=7, loss="future_kl", gamma=GAMMA, band=BAND, clip=(0.8, 1.28))
WORDS = ["the", " sum", " of", " both", " is", " 12", "\n", " So", "∑", " <b>", " x²", ","]


def response(place: int, tokens: int, **facts: Any) -> CreditResponse:
    """One response, four of each group. The first update of the step, where nothing has moved, is group 0's."""
    random = numpy.random.default_rng(place)
    group = place // 4
    moved = random.normal(0, 0.05 * (group > 0), tokens).astype(numpy.float32)
    takes_part = random.random(tokens) > 0.02
    future, total = numpy.zeros(tokens, numpy.float32), 0.0
    for token in reversed(range(tokens)):
        total = takes_part[token] * moved[token] + GAMMA * total
        future[token] = total
    old = -random.exponential(0.4, tokens).astype(numpy.float32)
    values = {
        "log_ratio": moved,
        "future_kl": future,
        "influence": numpy.exp(future).clip(*BAND),
        "entropy": random.exponential(0.5, tokens).astype(numpy.float32),
        "old_log_prob": old,
        "rollout_log_prob": old + random.normal(0, 0.01, tokens).astype(numpy.float32),
        "importance_weight": numpy.full(tokens, numpy.nan, numpy.float32),
    }
    assert tuple(values) == VALUES
    state = PRODUCED | COUNTS | TAKES_PART * takes_part | CLIPPED * (moved > numpy.log(1.28))
    plain = {
        "update": group,
        "group": group,
        "index": place % 4,
        "problem": f"problem {group}",
        "data_source": "made up",
        "prompt": "What is <i>5 + 7</i>?</script>",
        "ground_truth": "12",
        "answer": "12",
        "reward": 1.0 if place % 2 else -1.0,
        "accuracy": float(place % 2),
        "advantage": 1.0 if place % 2 else -1.0,
        "finish_reason": "stop" if place % 4 else "length",
        "weight_version": 6,
        "dropped": False,
    }
    texts = [WORDS[word] for word in random.integers(0, len(WORDS), tokens - 1)] + [""]
    ids = random.integers(0, 1000, tokens).astype(numpy.int32)
    return CreditResponse(plain | facts, texts, ids, TokenCredit(group, values, state.astype(numpy.uint8)))
