"""What vLLM's worker processes load of ours, by the name in `--worker-extension-cls`.

Importing this module registers the engines' halves of the weight transports; `access.RequireToken` is what its
API server loads.
"""

from vllm.distributed.weight_transfer import WeightTransferEngineFactory

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

    def abandon_weight_update(self) -> None:
        """Forgets an update that a trainer began and never finished, which vLLM would refuse to follow with another."""
        self._weight_update_active = False
