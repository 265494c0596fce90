"""Why: what rank 0 finds wrong with tokenizer, data or samples has to stop a run before it trains on it.

With the embedded model and problems, and a server address at which nobody listens: sampling itself is tests/end_to_end,
what is sampled is test_collector.py, what a resume compares is tests/data/test_fingerprint.py.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from megatron_fipo.assets import resolve_embedded
from megatron_fipo.config.configure import load_config
from megatron_fipo.errors import ConfigError, DataError
from megatron_fipo.rollout.main_loop import MainLoop
from megatron_fipo.rollout.training_rollouts import TrainingRollouts
from megatron_fipo.tracking.console import Console

pytestmark = pytest.mark.slow
VOCABULARY = 38


@pytest.fixture
def rollouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., TrainingRollouts]]:
    """Makes TrainingRollouts of overrides and of changes to the model's config.json; its warnings are in `warned`."""
    monkeypatch.setenv("FIPO_ROLLOUT_TOKEN", "secret")
    model = tmp_path / "model"
    shutil.copytree(resolve_embedded("embedded:tiny"), model)
    made: list[TrainingRollouts] = []

    def make(*overrides: str, warned: list[str] | None = None, **architecture: Any) -> TrainingRollouts:
        settings = json.loads((resolve_embedded("embedded:tiny") / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(settings | architecture))
        server = ["rollout.servers=0", "rollout.addresses=[http://127.0.0.1:9]"]
        reward = ["reward.rule=exact_match", "reward.workers=1"]
        config = load_config([f"model.path={model}", *server, *reward, *overrides])
        with Console(1, 0, enabled=False) as console:
            monkeypatch.setattr(console, "warn", ([] if warned is None else warned).append)
            made.append(TrainingRollouts(config, model, tmp_path, console, MainLoop()))
        return made[-1]

    yield make
    for each in made:
        each.__exit__()


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ({"vocab_size": 30}, "the tokenizer has 38 token ids, the model's embedding only 30"),
        ({"eos_token_id": [1, 99]}, r"end-of-sequence id 99 of config\.json is outside the model's 38 token ids"),
    ],
)
def test_a_tokenizer_that_does_not_fit_the_model_is_refused(rollouts, architecture, message) -> None:
    with pytest.raises(ConfigError, match=message):
        rollouts(**architecture)


def test_a_resume_goes_on_with_the_same_data_and_refuses_another(rollouts, tmp_path: Path) -> None:
    fewer = tmp_path / "fewer.jsonl"
    lines = resolve_embedded("embedded:tiny_train.jsonl").read_text().splitlines(keepends=True)
    fewer.write_text("".join(lines[:100]))
    state = rollouts().snapshot()
    order = replace(state.collected.order, position=5)
    state = replace(state, collected=replace(state.collected, order=order))
    warned: list[str] = []
    same = rollouts(warned=warned)
    same.restore(state)
    assert same.snapshot() == state and warned == []

    with pytest.raises(
        DataError, match=r"100 training problems, the checkpoint was trained on 4000 .*allow_change=true"
    ):
        rollouts(f"data.train=[{fewer}]").restore(state)
    allowed = rollouts(f"data.train=[{fewer}]", "data.allow_change=true", warned=warned)
    allowed.restore(state)
    assert "a new epoch of it begins" in warned.pop()
    order = allowed.snapshot().collected.order
    assert (order.epoch, order.position, order.size) == (1, 0, 100)
    # run.resume_changed allows other data too, and another order of the same.
    rollouts(f"data.train=[{fewer}]", "run.resume_changed=true", warned=warned).restore(state)
    assert "a new epoch of it begins" in warned.pop()
    with pytest.raises(DataError, match=r"order\.seed is 0, and this run's is 7"):
        rollouts("run.seed=7").restore(state)
    reordered = rollouts("run.seed=7", "run.resume_changed=true")
    reordered.restore(state)
    order = reordered.snapshot().collected.order
    assert (order.epoch, order.position, order.size, order.seed) == (1, 0, 4000, 7)


def test_prompts_with_todays_date_are_warned_about(rollouts, tmp_path: Path) -> None:
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ strftime_now('%d') }}{{ messages[0].content }}")
    warned: list[str] = []
    rollouts(warned=warned)
    assert len(warned) == 1 and "data.chat_template_date=YYYY-MM-DD" in warned[0]
    rollouts("data.chat_template_date=2026-01-31", warned=warned)
    assert len(warned) == 1
