"""The token that a pool's servers ask of their callers."""

from megatron_fipo.engines.pool import EnginePool


def token_of(pool: EnginePool) -> str:
    """What adopts the servers needs it."""
    return pool.headers["Authorization"].removeprefix("Bearer ")
