"""Combine the metrics of a step's updates."""

from collections import defaultdict


def over_updates(updates: list[dict[str, float]]) -> dict[str, float]:
    """Combine the updates' metrics: minimum, maximum, sum or mean, by name. ppo_kl of the first update is kept too."""
    collected: dict[str, list[float]] = defaultdict(list)
    for metrics in updates:
        for name, value in metrics.items():
            collected[name].append(value)
    combined: dict[str, float] = {"updates": float(len(updates)), "updates_skipped": 0.0}
    for name, values in collected.items():
        if name.endswith("_min"):
            combined[name] = min(values)
        elif name.endswith("_max"):
            combined[name] = max(values)
        elif name in ("updates_skipped", "tokens_trained", "responses_dropped"):
            combined[name] = sum(values)
        else:
            combined[name] = sum(values) / len(values)
    if updates:
        combined["ppo_kl_first"] = updates[0]["ppo_kl"]
    return combined
