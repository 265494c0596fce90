"""Why: what rank 0 finds wrong ends all ranks, and a user reads it once: no rank tells of a lost connection.

Real processes over gloo, under the launcher. Not covered: NCCL, which carries none of this.
"""

import subprocess
import sys
from pathlib import Path

import pytest

RANK = """
import os, time
import torch.distributed as dist
from megatron_fipo.config.configure import refusals_in_one_line
from megatron_fipo.errors import ConfigError
from megatron_fipo.policy.rendezvous import meeting_point
from megatron_fipo.weights.ranks import answer_of_rank_0, fact_of_rank_0, only_rank_0

rank = int(os.environ["RANK"])

def refuse():
    raise ConfigError("model.path", "is ä", "an a")

with refusals_in_one_line():
    dist.init_process_group("gloo", store=meeting_point(60), rank=rank, world_size=int(os.environ["WORLD_SIZE"]))
    try:
        assert fact_of_rank_0(rank == 0)
        assert answer_of_rank_0(lambda: [rank, 0.1, "ä" * 5000]) == [0, 0.1, "ä" * 5000]
        assert only_rank_0(object) is None or rank == 0
        for _ in range(20):
            only_rank_0(lambda: None)
        only_rank_0(refuse)
    finally:
        dist.destroy_process_group()
"""

LAUNCHER = """
import sys
from megatron_fipo.config.configure import refusals_in_one_line
from megatron_fipo.launch.local import launch
with refusals_in_one_line():
    sys.exit(launch(int(sys.argv[1]), sys.argv[2], [sys.executable, "-c", sys.argv[3]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 4])
def test_a_refusal_of_rank_0_is_one_line(tmp_path: Path, world_size: int) -> None:
    command = [sys.executable, "-c", LAUNCHER, str(world_size), str(tmp_path), RANK]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stdout) == (2, ""), ended.stderr
    assert ended.stderr == "error: model.path: is ä (an a)\n"
    said = [log.read_text() for log in (tmp_path / "logs").glob("*.log")]
    assert said == [""] * (world_size - 1)
