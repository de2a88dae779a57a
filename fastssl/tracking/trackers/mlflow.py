"""A run in MLflow: in a store of files in the run's folder, unless MLFLOW_TRACKING_URI names another."""

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from fastssl.tracking.trackers.tracker import PROJECT, End, RunFacts, flat, numbers

_STATUS = {"finished": "FINISHED", "preempted": "KILLED", "failed": "FAILED"}
_MAX_METRICS, _MAX_PARAMS, _MAX_TAGS = 1000, 100, 100  # of one call, as MLflow's servers take them
_MAX_PARAM, _MAX_TAG = 6000, 5000  # characters
_ID_TAG = "fastssl_run_id"


class Mlflow:
    """One MLflow run with all rows of metrics.jsonl.

    A resumed run is found by the run's id, which is a tag. MLflow takes no value back: steps that it has keep their
    values when a training repeats them after a kill.
    """

    def __init__(self, facts: RunFacts) -> None:
        # Before the import. MLflow wants the first where its store is of files, and reports its use without the second.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        self._metric = Metric
        store = os.environ.get("MLFLOW_TRACKING_URI") or (facts.folder / "mlflow").as_uri()
        self._client = MlflowClient(tracking_uri=store)
        self._steps: dict[str, set[int]] = {}  # by name of a number: those that MLflow has
        experiment = self._experiment_id(os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT)
        found = self._client.search_runs([experiment], filter_string=f"tags.`{_ID_TAG}` = '{facts.id}'", max_results=1)
        self._is_new = not found
        run = (
            self._client.create_run(experiment, run_name=facts.name, tags={_ID_TAG: facts.id})
            if not found
            else found[0]
        )
        self._run_id = run.info.run_id
        self._describe(facts, has_params=run.data.params)
        self._client.update_run(self._run_id, status="RUNNING")

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        now_ms = int(time.time() * 1000)
        values = (
            self._metric(name, value, now_ms, row["step"])
            for row in rows
            for name, value in numbers(row).items()
            if row["step"] not in self._known_steps(name)
        )
        for batch in _in_batches(values, _MAX_METRICS):
            self._client.log_batch(self._run_id, metrics=batch)

    def close(self, end: End) -> None:
        self._client.set_terminated(self._run_id, _STATUS[end])

    def _experiment_id(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        return found.experiment_id if found else self._client.create_experiment(name)

    def _known_steps(self, name: str) -> set[int]:
        if self._is_new:
            return set()
        if name not in self._steps:
            self._steps[name] = {metric.step for metric in self._client.get_metric_history(self._run_id, name)}
        return self._steps[name]

    def _describe(self, facts: RunFacts, has_params: Mapping[str, str]) -> None:
        from mlflow.entities import Param, RunTag

        params = ((_name(key), value[:_MAX_PARAM]) for key, value in flat(facts.config))
        tags = ((_name(key), value[:_MAX_TAG]) for key, value in flat(facts.environment))
        missing = (Param(key, value) for key, value in params if key not in has_params)
        for batch in _in_batches(missing, _MAX_PARAMS):
            self._client.log_batch(self._run_id, params=batch)
        for batch in _in_batches((RunTag(key, value) for key, value in tags), _MAX_TAGS):
            self._client.log_batch(self._run_id, tags=batch)


def _name(key: str) -> str:
    """A key as MLflow takes it."""
    return re.sub(r"[^\w.\- ]", "_", key)


def _in_batches(values: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while batch := list(islice(values, size)):
        yield batch
