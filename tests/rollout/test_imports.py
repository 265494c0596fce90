"""Why: a process that only samples must not wait for torch, nor hold its memory; one import far down brings it in.

Whole evaluations are asked the same at their end by tests/end_to_end/test_evaluate.py, in minutes.
"""

import json
import subprocess
import sys

ASK = """
import json, sys
import megatron_fipo.rollout_process.calls, megatron_fipo.rollout_process.process
print(json.dumps([name for name in ("torch", "megatron.core", "transformers", "vllm") if name in sys.modules]))
"""


def test_rollouts_import_neither_torch_nor_megatron() -> None:
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(done.stdout) == []
