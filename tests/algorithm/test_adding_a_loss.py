"""docs/adding_a_loss.md, done in an empty directory: its files are written, its test is run, its command composed.

Why: a how-to that nobody runs is wrong after the next change. Training with the page's loss is in
tests/end_to_end/test_train.py, what is refused in tests/test_plugins.py.
"""

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_fipo.algorithm.losses import LossInputs, TokenLosses, policy_loss, vanilla
from megatron_fipo.algorithm.statistics import metrics
from megatron_fipo.config import AlgorithmConfig
from megatron_fipo.config.checks import check
from megatron_fipo.config.configure import load_config
from megatron_fipo.errors import ConfigError, FipoError
from tests.algorithm.test_losses import random_inputs

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "adding_a_loss.md").read_text()


def write_page(directory: Path) -> None:
    """The page's files, in `directory`."""
    function, test = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (configuration,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (directory / "my_conf" / "algorithm").mkdir(parents=True)
    (directory / "my_losses.py").write_text(function)
    (directory / "test_spo.py").write_text(test)
    (directory / "my_conf" / "algorithm" / "spo.yaml").write_text(configuration)


@pytest.mark.slow
def test_the_pages_own_test_passes_and_sees_a_fault(tmp_path: Path) -> None:
    write_page(tmp_path)
    assert run_pytest(tmp_path).returncode == 0
    losses = tmp_path / "my_losses.py"
    losses.write_text(losses.read_text().replace("/ (2 * epsilon)", "/ epsilon"))
    assert run_pytest(tmp_path).returncode == 1


def run_pytest(directory: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_spo.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=120)


def test_the_pages_command_is_a_configuration_that_can_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_page(tmp_path)
    monkeypatch.chdir(tmp_path)
    (command,) = re.findall(r"^    megatron-fipo train (.*)$", PAGE, re.MULTILINE)
    config = load_config(shlex.split(command))
    assert check(config, local=True) == []
    assert (config.algorithm.loss_options, config.algorithm.clip_ratio_low) == ({"epsilon": 0.1}, 0.2)
    inputs = random_inputs(0)
    _, _, statistics = policy_loss(inputs, config.algorithm)
    assert 0 < metrics(statistics)["spo_outside"] < 1


@pytest.mark.slow
def test_the_pages_configuration_file_is_the_same(tmp_path: Path) -> None:
    write_page(tmp_path)
    show = [sys.executable, "-m", "megatron_fipo.train", "--config-dir", "my_conf", "algorithm=spo", "--cfg", "job"]
    done = subprocess.run(
        show, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "loss: my_losses.py:spo" in done.stdout and "epsilon: 0.1" in done.stdout and "name: spo" in done.stdout


def own(directory: Path, body: str, **options: float) -> AlgorithmConfig:
    """A configuration of a loss with this body, in a file of its own."""
    path = directory / "own.py"
    path.write_text(
        f"import torch\nfrom megatron_fipo.algorithm.losses import *\ndef own(inputs, config):\n    {body}\n"
    )
    return AlgorithmConfig(loss=f"{path}:own", loss_options=options)


def test_losses_alone_mean_the_response_mask_and_a_shipped_loss_can_be_used(tmp_path: Path) -> None:
    inputs = random_inputs(1)
    alone = own(tmp_path, "return vanilla(inputs, config).losses")
    expected = policy_loss(inputs, dataclasses.replace(alone, loss=None, loss_mode="vanilla"))
    found = policy_loss(inputs, alone)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return 1.0", "returned a float"),
        ("return None", "returned a NoneType"),
        ("return inputs.log_probs.sum()", r"returned losses torch.float64 \[\]"),
        ("return TokenLosses(inputs.log_probs, inputs.response_mask.float())", "returned a mask torch.float32"),
    ],
)
def test_what_is_no_loss_is_one_line(tmp_path: Path, body: str, said: str) -> None:
    with pytest.raises(FipoError, match=said) as refusal:
        policy_loss(random_inputs(2), own(tmp_path, body))
    assert "\n" not in str(refusal.value) and "own.py:own" in str(refusal.value)


def test_options_without_a_loss_and_names_of_none_are_refused() -> None:
    for overrides, key in (
        (["+algorithm.loss_options.epsilon=1"], "algorithm.loss_options"),
        (["algorithm.loss=spo"], "algorithm.loss"),
        (["algorithm.loss=my losses:spo"], "algorithm.loss"),
        (["algorithm.loss=nowhere.py:spo"], "algorithm.loss"),
    ):
        with pytest.raises(ConfigError) as refusal:
            check(load_config(overrides), local=True)
        assert refusal.value.key == key


def test_inputs_of_a_loss_are_what_the_page_says() -> None:
    inputs = random_inputs(3)
    assert isinstance(inputs, LossInputs) and isinstance(vanilla(inputs, AlgorithmConfig()), TokenLosses)
