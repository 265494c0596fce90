"""Small runs to simulate, whose seconds can be worked out by hand."""

from dataclasses import dataclass, replace

from megatron_fipo.rollout.admission import Admission, Rounds
from megatron_fipo.simulation.costs import EngineSize, MeasuredDecoding
from megatron_fipo.simulation.engine import Engine
from megatron_fipo.simulation.fleet import Dispatch, Place
from megatron_fipo.simulation.lengths import Lengths
from megatron_fipo.simulation.run import Parts, Played, Simulation
from megatron_fipo.simulation.settings import Settings, Troubles

SETTINGS = Settings(
    lengths=Lengths(mean=200, spread=0.8, longest=1000),
    prompt=50,
    rejected=0.4,
    steps=12,
    warm_up=2,
    seed=1,
    samples_at_once=None,
)
PROMPTS, SAMPLES = 8, 4


@dataclass(frozen=True)
class Costly:
    """Decoding whose seconds depend on the batch and on what is held, and whose prefill takes time."""

    def decode_s(self, batch: float, held: float) -> float:
        return 0.01 + 1e-3 * batch + 1e-6 * held

    def prefill_s(self, tokens: float) -> float:
        return 1e-4 * tokens


def scene(
    admission: Admission,
    engines: int = 2,
    places: int = 8,
    cache_tokens: float = float("inf"),
    costs: Costly | MeasuredDecoding | None = None,
    trainer_s: float = 3.0,
    recompute: bool = True,
) -> Parts:
    size = EngineSize(places, cache_tokens)
    return Parts(
        admission=admission,
        engines=[Engine(costs or Costly(), size, SETTINGS.prompt, 1 / SAMPLES, 1, 1.0) for _ in range(engines)],
        places=places,
        samples=SAMPLES,
        trainer=lambda tokens, sequences: (trainer_s / 3, 2 * trainer_s / 3),
        weights_s=0.5,
        recompute=recompute,
        stream_tokens=64,
        dispatch=Dispatch(Place.SAMPLES, places + 2 * SAMPLES),
    )


def played(parts: Parts, **changed: object) -> Played:
    return Simulation(parts, replace(SETTINGS, **changed)).play()  # type: ignore[arg-type]


def rounds(surplus: str = "carry") -> Rounds:
    return Rounds(PROMPTS, 2 * PROMPTS, 10, surplus == "carry")


WITH_TROUBLES = Troubles(hours_between_failures=0.01, restart_s=20)
