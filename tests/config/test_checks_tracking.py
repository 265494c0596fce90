"""Why: a tracker whose package or key is missing should be refused in a second, and not found in the log of a long run.

find_spec is replaced, since which packages are installed depends on the machine.
"""

from importlib.machinery import ModuleSpec

import pytest

from megatron_fipo.config import TrackingConfig, checks_tracking
from megatron_fipo.config.checks import check
from megatron_fipo.config.checks_tracking import check_trackers_here
from megatron_fipo.config.configure import load_config
from megatron_fipo.errors import ConfigError


@pytest.fixture(autouse=True)
def no_keys(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.parametrize(("name", "install"), [("wandb", "wandb"), ("mlflow", "mlflow-skinny"), ("trackio", "trackio")])
@pytest.mark.parametrize("found", [None, ModuleSpec("wandb", None)])  # the second: a directory of that name
def test_a_missing_package_is_refused_with_what_to_install(monkeypatch, name, install, found):
    monkeypatch.setattr(checks_tracking, "find_spec", lambda _: found)
    with pytest.raises(ConfigError, match=rf"{name} is not installed.*pip install {install},"):
        check_trackers_here(TrackingConfig(to=[name]))
    monkeypatch.setattr(checks_tracking, "find_spec", lambda _: ModuleSpec(name, None, origin="a file"))
    check_trackers_here(TrackingConfig(to=[name], offline=True))


def test_wandb_needs_a_key_unless_it_is_offline(monkeypatch, tmp_path):
    """Without one it would ask for it, and nobody may sit there."""
    monkeypatch.setattr(checks_tracking, "find_spec", lambda _: ModuleSpec("wandb", None, origin="a file"))
    with pytest.raises(ConfigError, match=r"wandb has no key.*tracking\.offline=true"):
        check_trackers_here(TrackingConfig(to=["wandb"]))
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers_here(TrackingConfig(to=["wandb"]))
    monkeypatch.delenv("WANDB_MODE")
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password 0123456789\n")
    check_trackers_here(TrackingConfig(to=["wandb"]))


def test_a_tracker_that_is_none_is_refused():
    with pytest.raises(ConfigError, match=r'tracking\.to: "visdom" is not a choice'):
        check(load_config(["tracking.to=[tensorboard,visdom]"]), local=False)
    check(load_config(["tracking.to=[]"]), local=False)
