"""What a run folder says, in fixed types: what draws and writes can't stumble over it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Model", "Picture", "Round", "Run", "Scores", "SiteRound"]

Scores = Mapping[str, float]
"""Finite numbers by name; what is undefined isn't there."""


@dataclass(frozen=True, kw_only=True)
class SiteRound:
    """A site's part in a round.

    Attributes:
        status: `ok`, `late`, `failed`, `refused`, `quarantined`; `evaluated` where a site wasn't
            asked to train.
        why: In words, where the status isn't `ok`.
        weight: Of its update.
        seconds: From the request to the reply.
        bytes_up: Size of its update.
        training: Numbers of its training.
        metrics: Of the round's global model on its held-out cases.
    """

    status: str
    why: str
    weight: float
    seconds: float
    bytes_up: float
    training: Scores
    metrics: Scores


@dataclass(frozen=True, kw_only=True)
class Round:
    """A line of the history.

    Attributes:
        number: 0 is the model before training.
        scopes: `global`, `unseen`, `federated`: metrics of the round's global model.
        sites: By name.
        seconds: It took.
        bytes_up: From all sites.
        bytes_down: To all sites.
        privacy: What was spent, `epsilon` and `delta`; None where nothing is counted.
        late: Updates of earlier rounds: site, round, and whether it was used.
        score: What the best round is chosen by: number of regions, and their mean Dice or what the
            study monitors.
        failed: Why the round moved no model, `""` where it did.
        summed: Sites in the sum of secure aggregation, 0 without.
        sums: Numbers of their training, added up.
    """

    number: int
    scopes: Mapping[str, Scores]
    sites: Mapping[str, SiteRound]
    seconds: float
    bytes_up: float
    bytes_down: float
    privacy: Scores | None
    late: Sequence[tuple[str, int, bool]]
    score: tuple[int, float] | None
    failed: str = ""
    summed: int = 0
    sums: Scores = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model file: its round, as the file itself says, and its size."""

    name: str
    round: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A held-out case of the server: the scan alone, and with mask and prediction."""

    title: str
    scan: bytes
    overlay: bytes
    dice: Scores
    case: str


@dataclass(frozen=True, kw_only=True)
class Run:
    """All that a run folder says.

    Attributes:
        folder: The folder.
        id: The study run.
        config: `config.json`.
        plan: `plan.json`.
        manifest: `manifest.json`.
        rounds: In order.
        compared: Row of `comparison.json` (`local: aachen`, `pooled`, `federated`) to its metrics.
        matrix: Site of a model to site of the cases to metrics.
        everywhere: Other model (`pooled`, `federated`) to site of the cases to metrics.
        differences: Row to metric to `difference`, `low` and `high` of the federated model to it.
        wanted_rounds: Rounds the study is to have, 0 where the config doesn't say.
        steps: Optimiser steps each row of the comparison took.
        models: Model files.
        pictures: Of the server's cases.
        problems: What couldn't be read, one line each.
    """

    folder: Path
    id: str
    config: Mapping[str, Any] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)
    manifest: Mapping[str, Any] = field(default_factory=dict)
    rounds: Sequence[Round] = ()
    compared: Mapping[str, Scores] = field(default_factory=dict)
    matrix: Mapping[str, Mapping[str, Scores]] = field(default_factory=dict)
    everywhere: Mapping[str, Mapping[str, Scores]] = field(default_factory=dict)
    differences: Mapping[str, Mapping[str, Scores]] = field(default_factory=dict)
    wanted_rounds: int = 0
    steps: float | None = None
    models: Sequence[Model] = ()
    pictures: Sequence[Picture] = ()
    problems: Sequence[str] = ()

    @property
    def best(self) -> Round | None:
        """Round of the best model: the first with the highest score."""
        scored = [(part.score, part) for part in self.rounds if part.score is not None]
        return max(scored, key=lambda pair: pair[0], default=(None, None))[1]
