"""Why: an evaluation on running servers must not score another model than it names, nor a run's newer weights.

Not covered: servers that change their weights in the middle of an evaluation.
"""

from pathlib import Path

import httpx
import pytest

from megatron_fipo.errors import RolloutError
from megatron_fipo.evaluation.served import check_served
from tests.rollout.conftest import Rollout

pytestmark = pytest.mark.slow


def test_servers_of_another_model_are_refused(rollout: Rollout, tmp_path: Path) -> None:
    (server,) = rollout.pool.servers
    (option,) = [text for text in server.command if text.startswith("--model=")]
    directory = Path(option.removeprefix("--model="))
    with httpx.Client(headers=rollout.pool.headers, base_url=server.url) as client:
        before = client.get("/weight_info").json()["weight_version"]
        try:
            client.post("/update_weight_version", json={"new_version": "0"}).raise_for_status()
            check_served(rollout.pool, directory)
            with pytest.raises(RolloutError, match=r"serves .*, and model.path is"):
                check_served(rollout.pool, tmp_path)
            client.post("/update_weight_version", json={"new_version": "7"}).raise_for_status()
            with pytest.raises(RolloutError, match="has weights of a run's step 7"):
                check_served(rollout.pool, directory)
        finally:
            client.post("/update_weight_version", json={"new_version": before}).raise_for_status()
