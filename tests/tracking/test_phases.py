"""Why: a response can be long because it checks itself, or because it repeats itself, and these should not look alike.

Not covered: whether the patterns of the default find what a reader would call reflection.
"""

import random
import re
import time
from dataclasses import replace

import numpy
import pytest

from megatron_fipo.config import TrackingConfig
from megatron_fipo.config.checks_tracking import tracking
from megatron_fipo.config.configure import load_config
from megatron_fipo.errors import ConfigError
from megatron_fipo.records.sample import Group, sample_from_lists
from megatron_fipo.tracking.phases import compiled_markers, phase_metrics, repeated_share
from tests.tracking.groups import make_group

MARKERS = compiled_markers(TrackingConfig())


def test_lengths_are_apart_by_verdict_and_without_one_they_are_left_out():
    metrics = phase_metrics([make_group("9987T", "9", lengths=[10, 30, 5, 7, 1000])], MARKERS)
    assert metrics["response_length_right_mean"] == 20 and metrics["response_length_wrong_mean"] == 6
    assert [metrics[f"response_length_right_q{q}"] for q in (10, 50, 90)] == [12, 20, 28]
    assert "response_length_right_mean" not in phase_metrics([make_group("87", "9")], MARKERS)
    assert phase_metrics([], MARKERS) == {}


def test_markers_and_padding_are_counted_by_response():
    texts = ["Wait, let me think.", "I verify it. WAIT", r"x\quad\,\!", "plain: waiting"]
    metrics = phase_metrics([make_group("9999", "9").with_texts(texts)], MARKERS)
    assert metrics["marker_share_reflection"] == 0.5 and metrics["marker_share_verification"] == 0.25
    assert metrics["marker_share_backtracking"] == 0
    assert metrics["latex_padding"] == pytest.approx(9 / sum(map(len, texts)))


@pytest.mark.parametrize(
    "pattern", [r"\bwait\b", r"\bverify", r"it\b", "let's Go", r"\+", r"wa.t", r"a\b-b", r"^wait", "Ä:"]
)
def test_a_marker_agrees_with_the_regular_expression(pattern):
    """Most are found as texts, which takes less time; the others show that nothing else is taken for a text."""
    marker = compiled_markers(replace(TrackingConfig(), reflection_markers=[pattern]))["reflection"][0]
    draw, seen = random.Random(0), set()
    pieces = ["wait", "WAIT", " ", "\n", "_", "s", "verify", "un", "it", "Let's go", "+", "a", "-b", "ä:", "é", ""]
    for _ in range(2000):
        text = "".join(draw.choices(pieces, k=4))
        seen.add(expected := re.search(pattern, text, re.IGNORECASE) is not None)
        assert marker.is_in(text, text.lower()) == expected, text
    assert seen == {True, False}, "the control: both happen"


def test_long_responses_take_little_of_a_step():
    """The rollout process does nothing else meanwhile. Regular expressions that ignore case took four times as long."""
    draw = random.Random(0)
    words = ["the", "sum", "of", "numbers", "is", "equal", "to", "x", "and", "waiting", "almost", "where", "each"]
    text = " ".join(draw.choices(words, k=6500))
    sample = replace(
        sample_from_lists([draw.randrange(30000) for _ in range(8192)], [-0.5] * 8192, "stop", 1), text=text
    )
    group = make_group("9" * 8, "9")
    groups = [Group(group.problem, tuple(replace(sample, result=group.results[0]) for _ in range(8)))] * 8
    searched = {kind: [replace(marker, plain=None) for marker in markers] for kind, markers in MARKERS.items()}
    seconds = {}
    for name, markers in (("found", MARKERS), ("searched", searched)):
        began = time.process_time()
        phase_metrics(groups, markers)
        seconds[name] = time.process_time() - began
    assert seconds["found"] < 0.6 * seconds["searched"]


def test_repeated_runs_agree_with_a_plain_count():
    draw = random.Random(0)
    for _ in range(50):
        tokens = [draw.randrange(2) for _ in range(draw.randrange(60))]
        runs = [tuple(tokens[start : start + 8]) for start in range(len(tokens) - 7)]
        expected = 1 - len(set(runs)) / len(runs) if runs else 0.0
        assert repeated_share(numpy.array(tokens, numpy.int32)) == pytest.approx(expected)
    assert repeated_share(numpy.arange(100, dtype=numpy.int32)) == 0, "the control: nothing is repeated"


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)(a|a)", "a*", r"\d{3}", "a?" * 9, "[", "", "x" * 201, r"[a]\1"])
@pytest.mark.parametrize("kind", ["reflection", "verification", "backtracking"])
def test_a_pattern_that_could_take_for_ever_is_refused(pattern, kind):
    config = load_config()
    config = replace(config, tracking=replace(config.tracking, **{f"{kind}_markers": [r"no \+ \(this\)", pattern]}))
    with pytest.raises(ConfigError, match=rf"tracking\.{kind}_markers"):
        list(tracking(config))


def test_the_default_is_allowed():
    """The control of the test above."""
    assert list(tracking(load_config())) == []


def test_a_large_step_with_hostile_text_takes_no_time():
    """8,192 responses of 4,096 tokens and 16,384 characters that nearly match, many times over."""
    sample = replace(sample_from_lists([1, 2] * 2048, [-0.5] * 4096, "stop", 1), text="wai wait_ \\q double-chec" * 683)
    group = make_group("9" * 8, "9")
    groups = [Group(group.problem, tuple(replace(sample, result=group.results[0]) for _ in range(8)))] * 1024
    began = time.process_time()
    metrics = phase_metrics(groups, MARKERS)
    seconds = time.process_time() - began
    print(f"{seconds:.2f} s")
    assert metrics["repeated_ngrams"] > 0.99 and metrics["marker_share_reflection"] == 0
    assert seconds < 6, "three times what it may take on a machine that does nothing else"
