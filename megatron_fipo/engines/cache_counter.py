"""Two numbers in an engine's scheduler: sequences that the cache had no room left for, and how full it was at most.

vLLM's own statistics count as preempted what a weight update has computed again too, know the present use and not its
peak, and take some microseconds per token.
"""

from typing import Any

TAKE = "fipo_take_cache_use"
"""The engine's method that says both, and begins the peak anew."""
_KEPT = "fipo_cache_use"


def count_cache_use() -> None:
    """Have an engine that runs in this process count. To be called in each process that may have one, before it has."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCore

    kind: Any = Scheduler
    schedule = kind.schedule

    def counted(scheduler: Any, *args: Any, **more: Any) -> Any:
        # A weight update puts back what runs, and not for lack of room.
        before = len(scheduler.reset_preempted_req_ids)
        output = schedule(scheduler, *args, **more)
        preemptions, peak = getattr(scheduler, _KEPT, (0, 0.0))
        preemptions += max(0, len(output.preempted_req_ids or ()) - before)
        setattr(scheduler, _KEPT, (preemptions, max(peak, scheduler.kv_cache_manager.usage)))
        return output

    def take(engine: Any) -> tuple[int, float]:
        preemptions, peak = getattr(engine.scheduler, _KEPT, (0, 0.0))
        setattr(engine.scheduler, _KEPT, (preemptions, 0.0))
        return preemptions, peak

    kind.schedule = counted
    setattr(EngineCore, TAKE, take)
