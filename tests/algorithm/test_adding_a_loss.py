"""docs/adding_a_loss.md, done: its edits are made in a copy of the package, and the new loss is run there.

Why: a how-to that nobody runs is wrong after the next change. Not covered: training with the new loss; that is no other
code than with the losses there are.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

COMPARE = """
import sys, torch
import megatron_fipo
from megatron_fipo.algorithm.losses import policy_loss
from megatron_fipo.algorithm.statistics import metrics
from megatron_fipo.config.checks import check
from megatron_fipo.config.configure import load_config
from tests.algorithm import plain
from tests.algorithm.test_losses import random_inputs

assert list(megatron_fipo.__path__) == [sys.argv[1]], megatron_fipo.__path__
config = load_config(["algorithm=spo"])
check(config, local=False)
inputs = random_inputs(0)
loss_sum, normaliser, statistics = policy_loss(inputs, config.algorithm)
expected = plain.plain_loss(inputs, config.algorithm)
found = loss_sum / normaliser
torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
gradients = [torch.autograd.grad(loss, inputs.log_probs)[0] for loss in (found, expected)]
torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
assert 0 < metrics(statistics)["spo_outside"] < 1
"""


def insert(path: Path, before: str, text: str) -> None:
    source = path.read_text()
    assert source.count(before) == 1, f"{path.name}: {before!r}"
    path.write_text(source.replace(before, text + before))


@pytest.mark.slow
def test_the_worked_example_runs(tmp_path: Path) -> None:
    document = (ROOT / "docs" / "adding_a_loss.md").read_text()
    function, registered, settings, transcription = re.findall(r"```python\n(.*?)```", document, re.DOTALL)
    (configuration,) = re.findall(r"```yaml\n(.*?)```", document, re.DOTALL)
    for name in ("megatron_fipo", "conf"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    (tmp_path / "tests").mkdir()
    shutil.copytree(ROOT / "tests" / "algorithm", tmp_path / "tests" / "algorithm")
    losses = tmp_path / "megatron_fipo" / "algorithm" / "losses.py"
    insert(losses, "LOSSES: dict", function + "\n\n")
    insert(losses, '    "sapo": sapo,\n', registered)
    insert(tmp_path / "megatron_fipo" / "config" / "algorithm.py", '    "sapo": (', settings)
    (tmp_path / "conf" / "algorithm" / "spo.yaml").write_text(configuration)
    plain = tmp_path / "tests" / "algorithm" / "plain.py"
    insert(plain, "PLAIN: dict", transcription + "\n\n")
    insert(plain, '    "sapo": _sapo,\n', '    "spo": _spo,\n')
    done = subprocess.run(
        [sys.executable, "-c", COMPARE, str(tmp_path / "megatron_fipo")],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
