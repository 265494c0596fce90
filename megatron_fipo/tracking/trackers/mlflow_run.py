"""MLflow: the server of MLFLOW_TRACKING_URI, or files in run.directory/mlflow."""

import os
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_fipo.tracking.trackers.protocol import TrackedRun
from megatron_fipo.tracking.trackers.run_ids import keep_id, kept_id

_PARAMETERS_AT_ONCE = 100
_LONGEST_PARAMETER = 500
"""What every store of MLflow takes, in characters. Whole settings are in config.yaml."""


class MLflowRun:
    """One run of the experiment `tracking.project`."""

    def __init__(self, run: TrackedRun) -> None:
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            # MLflow asks whoever writes files, and not to a database, to say so.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric = Metric
        place = os.environ.get("MLFLOW_TRACKING_URI") or (run.directory / "mlflow").resolve().as_uri()
        self._client = MlflowClient(tracking_uri=place)
        run_id = kept_id(run.directory, "mlflow")
        if run_id is None:
            run_id = self._client.create_run(_experiment(self._client, run.project), run_name=run.name).info.run_id
            keep_id(run.directory, "mlflow", run_id)
        else:
            self._client.update_run(run_id, status="RUNNING")
        # Also of a run that is there: the attempt that made it may have failed after it.
        known = self._client.get_run(run_id).data.params
        given = [(key, value) for key, value in _flat(run.settings) if key not in known]
        parameters = [Param(key, value[:_LONGEST_PARAMETER]) for key, value in given]
        for first in range(0, len(parameters), _PARAMETERS_AT_ONCE):
            self._client.log_batch(run_id, params=parameters[first : first + _PARAMETERS_AT_ONCE])
        self._run_id = run_id

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(_allowed(name), float(value), now, step) for name, value in scalars.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def finish(self) -> None:
        self._client.set_terminated(self._run_id)


def _experiment(client: Any, name: str) -> str:
    """Return the id of the experiment of this name, which is made if there is none."""
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name))
        except Exception:
            found = client.get_experiment_by_name(name)
            if found is None:  # no other run has made it in the meantime
                raise
    return str(found.experiment_id)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield _allowed(f"{prefix}{key}"), "null" if value is None else str(value)


def _allowed(name: str) -> str:
    """Return a name with the characters that MLflow takes; data sources may have others in theirs."""
    return re.sub(r"[^\w\-. /]", "_", name, flags=re.ASCII)
