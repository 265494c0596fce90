"""What vLLM's worker processes load of ours, by the name in `--worker-extension-cls`.

Importing this module registers the engines' halves of the weight transports; `access.RequireToken` is what its
API server loads.
"""

import socket
from typing import Any

import msgspec
from vllm.distributed.weight_transfer import WeightTransferEngineFactory

from megatron_fipo.weights.transport_records import WorkerPlace

ENGINES = {
    "process_group": ("megatron_fipo.engines.receivers", "ProcessGroupEngine"),
    "shared_memory": ("megatron_fipo.engines.receivers", "SharedMemoryEngine"),
    "cuda_ipc": ("megatron_fipo.engines.cuda_ipc_receiver", "CudaIpcEngine"),
}

for transport, (module, engine) in ENGINES.items():
    # A worker may be forked from a process that has imported this already.
    if transport not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(transport, module, engine)


class WorkerExtension:
    """Mixed into vLLM's worker, which is also what makes vLLM import this module where its workers are."""

    _weight_update_active: bool
    device: Any

    def place(self) -> dict[str, Any]:
        """Where this worker runs, as a WorkerPlace in JSON's types."""
        gpu = None
        if self.device.type == "cuda":
            from megatron_fipo.weights.cuda_ipc import device_uuid

            gpu = device_uuid(self.device)
        return msgspec.to_builtins(WorkerPlace(socket.gethostname(), gpu))

    def abandon_weight_update(self) -> None:
        """Forgets an update that a trainer began and never finished, which vLLM would refuse to follow with another."""
        self._weight_update_active = False
