"""Trackers: the rounds' numbers in TensorBoard files, MLflow or W&B, while a run goes on.

A tracker is a context manager made from the run folder and the study config; inside it, a function
takes the round and its numbers. All of them write into the run folder unless their own environment
variables say otherwise: nothing is sent anywhere that nobody asked for.
"""

import contextlib
import importlib.util
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from fedseg.config import StudyConfig
from fedseg.errors import ConfigError
from fedseg.registry import resolve
from fedseg.report.run_files import scores, table
from fedseg.sections import kebab

__all__ = ["PACKAGES", "TRACKERS", "check_trackers", "scalars", "tracking"]

log = logging.getLogger(__name__)

Log = Callable[[int, Mapping[str, float]], None]
Line = Mapping[str, Any]


@contextlib.contextmanager
def tracking(folder: Path, study: StudyConfig) -> Iterator[Callable[[Line], None]]:
    """Open the trackers of `output.trackers`; yields what takes each line of the history.

    A tracker that fails is a line in the log and gets no more lines: the run goes on.

    Args:
        folder: The run folder.
        study: The study config.
    """
    with contextlib.ExitStack() as stack:
        logs: dict[str, Log] = {}
        for name in _names(study):
            with _excused(name):
                opened = resolve("output.trackers", name, TRACKERS)(folder, study)
                logs[name] = stack.enter_context(_excused_at_exit(name, opened))

        def track(line: Line) -> None:
            for name, write in list(logs.items()):
                try:
                    write(int(line["round"]), scalars(line))
                except Exception as error:
                    _say_lost(name, error)
                    del logs[name]

        yield track


@contextlib.contextmanager
def _excused(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        _say_lost(name, error)


def _say_lost(name: str, error: Exception) -> None:
    log.warning("tracker %s: %s; the run goes on without it", name, error)


@contextlib.contextmanager
def _excused_at_exit(name: str, opened: AbstractContextManager[Log]) -> Iterator[Log]:
    write = opened.__enter__()
    try:
        yield write
    finally:
        with _excused(name):
            opened.__exit__(None, None, None)


def _names(study: StudyConfig) -> list[str]:
    names = (name.strip() for name in study.output.trackers.split(","))
    return list(dict.fromkeys(name for name in names if name))


def check_trackers(study: StudyConfig) -> None:
    """Check `output.trackers` before anything starts.

    Raises:
        ConfigError: There is no such tracker, or its package isn't installed.
    """
    for name in _names(study):
        resolve("output.trackers", name, TRACKERS)
        package = PACKAGES.get(name, "")
        if package and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"output.trackers: got '{name}', and package {package} isn't installed at the "
                f"server; run pip install 'fedseg[{name}]', or leave it out"
            )


def scalars(line: Line) -> dict[str, float]:
    """Flatten a line: `global/liver.dice`, `sites/aachen/liver.dice`, `round/seconds`, ...

    Counts of cases stay out; what is undefined isn't there.
    """
    found = {f"round/{key}": value for key, value in scores(line).items() if key != "round"}
    for scope in ("global", "unseen", "federated", "privacy"):
        found |= _under(scope, line.get(scope))
    secagg = table(line.get("secagg"))
    sums, count = scores(secagg.get("sums")), scores(secagg).get("summed")
    if "loss" in sums and count:
        found["round/loss"] = sums["loss"] / count
    for name, site in table(line.get("sites")).items():
        found |= _under(f"sites/{name}", table(site).get("metrics"))
        training = scores(table(site).get("training"))
        found |= {f"sites/{name}/{key}": training[key] for key in ("loss",) if key in training}
        seconds = scores(site).get("seconds")
        if seconds is not None:
            found[f"sites/{name}/seconds"] = seconds
    return found


def _under(place: str, summary: object) -> dict[str, float]:
    return {
        f"{place}/{key}": value
        for key, value in scores(summary).items()
        if not key.endswith(".cases") and key not in ("cases", "skipped")
    }


def _settings(study: StudyConfig) -> dict[str, str]:
    """The study config as parameters, but where things lie on this machine."""
    sections = study.model_dump(
        mode="json",
        exclude={"data": {"dir", "server_dir"}, "model": {"init_from"}, "output": True},
    )
    return {
        f"{section}.{kebab(name)}": "" if value is None else str(value)
        for section, values in sections.items()
        for name, value in values.items()
    }


@contextlib.contextmanager
def _tensorboard(folder: Path, study: StudyConfig) -> Iterator[Log]:
    """Write event files into `<run>/tensorboard`: `tensorboard --logdir <run>`."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def write(number: int, found: Mapping[str, float]) -> None:
        for key, value in found.items():
            writer.add_scalar(key, value, number)
        writer.flush()

    try:
        yield write
    finally:
        writer.close()


@contextlib.contextmanager
def _mlflow(folder: Path, study: StudyConfig) -> Iterator[Log]:
    """Write into `MLFLOW_TRACKING_URI`, else into a database `<run>/mlflow.db`."""
    from mlflow.entities import Metric, Param
    from mlflow.tracking import MlflowClient

    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri)
    known = client.get_experiment_by_name("fedseg")
    experiment = known.experiment_id if known else client.create_experiment("fedseg")
    tag = {"fedseg.run": folder.name}
    before = client.search_runs([experiment], f"tags.`fedseg.run` = '{folder.name}'")
    run = before[0] if before else client.create_run(experiment, tags=tag, run_name=folder.name)
    if not before:
        settings = [Param(key, value) for key, value in _settings(study).items()]
        for part in _parts(settings):
            client.log_batch(run.info.run_id, params=part)

    def write(number: int, found: Mapping[str, float]) -> None:
        now = time.time_ns() // 1_000_000
        for part in _parts([Metric(key, value, now, number) for key, value in found.items()]):
            client.log_batch(run.info.run_id, metrics=part)

    try:
        yield write
    finally:
        client.set_terminated(run.info.run_id)


def _parts(entries: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Cut entries into what MLflow takes in one request: 100 parameters, 1000 metrics."""
    yield from (entries[start : start + 100] for start in range(0, len(entries), 100))


@contextlib.contextmanager
def _wandb(folder: Path, study: StudyConfig) -> Iterator[Log]:
    """Write into `<run>/wandb`, offline unless `WANDB_MODE` says otherwise; see `wandb sync`."""
    import wandb

    run = wandb.init(
        project="fedseg",
        id=folder.name,
        name=folder.name,
        dir=str(folder),
        config=_settings(study),
        mode=os.environ.get("WANDB_MODE") or "offline",
        resume="allow",
        settings=wandb.Settings(console="off", silent=True),
    )

    def write(number: int, found: Mapping[str, float]) -> None:
        run.log(dict(found), step=number)

    try:
        yield write
    finally:
        run.finish()


TRACKERS: dict[str, Callable[[Path, StudyConfig], AbstractContextManager[Log]]] = {
    "tensorboard": _tensorboard,
    "mlflow": _mlflow,
    "wandb": _wandb,
}
"""Name to tracker."""

PACKAGES = {"tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb"}
"""Name to the package it needs, which the extra of the same name installs."""
