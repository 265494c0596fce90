"""What the rank of test_checkpoints.py runs: many spoilt copies of one checkpoint, resumed from one after the other."""

import random
import resource
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from megatron_fipo.config import Config
from megatron_fipo.errors import FipoError
from megatron_fipo.policy import checkpoint, checkpoint_manifest, model, platform
from megatron_fipo.policy.attention import RMSNorm
from megatron_fipo.policy.update import Policy
from tests.fuzz.budget import one_case
from tests.fuzz.mutators import spoil_file, spoil_json
from tests.policy.checkpoints import _policy, _save, _values

VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        -1,
        0,
        1,
        3,
        99,
        10**6,
        2**40,
        10**30,
        0.5,
        float("nan"),
        float("inf"),
        "",
        "x",
        "0.0.1",
        "99.1",
    ),
    *("", "x", "0.0.1", "99.1", "torch_dist", "zarr", "\ud800", "../x", [], [0], [[]], {}, {"step": 3}, {"x": [1]}),
]
NAMES = ["", "x", "step", "megatron_core", "sharded_backend", "common_backend", "seconds"]
MEMORY = 6 << 30
"""More than all that a sound checkpoint needs, in bytes: sizes that are made up must not take the machine's."""


def resume_from_spoilt(model_dir: str, directory: str, seed: int, count: int) -> dict[str, Any]:
    """Outcomes of `count` resumes by name, and what failed: an error that is no line of ours, or other values."""
    platform.start_process_group(60)
    model.start_model_parallel(Config().parallel, seed=0)
    policy = _policy(model_dir, RMSNorm)
    sound, other = (_saved(policy, model_dir, Path(directory, name)) for name in ("sound", "other"))
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    rng, outcomes, failures = random.Random(seed), Counter[str](), []
    expected = _expected(policy, sound)
    for number in range(count):
        spoilt = Path(directory, f"spoilt-{number}", sound.name)
        shutil.copytree(sound, spoilt)
        what = _spoil(rng, spoilt, other) if number else "nothing"
        try:
            with one_case():
                outcomes[_outcome(policy, spoilt, expected, verified=rng.random() < 0.5)] += 1
        except Exception as error:
            failures.append(f"{what[:300]}: {type(error).__name__}: {str(error)[:300]}")
        shutil.rmtree(spoilt.parent)
    platform.stop_process_group()
    return {"outcomes": outcomes, "failures": failures}


def _saved(policy: Policy, model_dir: str, directory: Path) -> Path:
    """A checkpoint of values that are random by its name."""
    generator = torch.Generator().manual_seed(sum(map(ord, directory.name)))
    for value in _values(policy).values():
        value.copy_(torch.rand(value.shape, generator=generator))
    return _save(policy, model_dir, directory)


def _expected(policy: Policy, sound: Path) -> dict[str, torch.Tensor]:
    checkpoint.load(policy, sound)
    return {name: value.clone() for name, value in _values(policy).items()}


def _spoil(rng: random.Random, spoilt: Path, other: Path) -> str:
    """Spoil a file, or take it from another checkpoint; what was done. Those of the policy more often than others."""
    files = sorted(path for path in spoilt.rglob("*") if path.is_file())
    path = rng.choice(
        [*files, *(file for file in files if file.suffix in (".distcp", ".pt") or file.name == ".metadata")]
    )
    if rng.random() < 0.1:
        shutil.copyfile(other / path.relative_to(spoilt), path)
        return f"{path.name}: another checkpoint's"
    return spoil_json(rng, path, VALUES, NAMES) if path.suffix == ".json" else spoil_file(rng, path)


def _outcome(policy: Policy, spoilt: Path, expected: dict[str, torch.Tensor], verified: bool) -> str:
    """As a run resumes, or as one that skips the checksums does: then damage may load, but nothing else may happen."""
    for value in _values(policy).values():
        value.fill_(torch.nan)
    try:
        if verified:
            checkpoint_manifest.verify(spoilt)
        checkpoint.load(policy, spoilt)
    except FipoError as error:
        said = str(error)
        assert "\n" not in said and len(said) < 1500 and str(spoilt) in said, f"not one line that names it: {said}"
        return "refused"
    found = _values(policy)
    differing = [name for name, value in expected.items() if not torch.equal(found[name], value)]
    assert not verified or not differing, f"other values than were saved, without a word: {differing}"
    return "resumed"
