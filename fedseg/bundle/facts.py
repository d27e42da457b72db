"""What a model card says of a run: its data, scores, privacy and origin, in numbers and words."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedseg.data.plan import REGIONS
from fedseg.errors import DataError
from fedseg.privacy.mechanisms import MEMBERS
from fedseg.report.costs import spent_words
from fedseg.report.headline import SCOPES
from fedseg.report.run import Run, Scores
from fedseg.report.run_files import read_run, scores, table, text
from fedseg.segmentation.metrics import METRICS

__all__ = ["UNTOLD", "Facts", "evaluation_rows", "facts_of"]

UNTOLD = "Not told: the model file came without a run that says it"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All that differs from card to card.

    Attributes:
        name: Name of the bundle.
        run: Study run, `""` if unknown.
        round: Its round, as text.
        license: Of the weights.
        authors: Who made them.
        data: What it was trained on, in a sentence.
        phantoms: Whether that was phantoms alone.
        privacy: What was spent, in a sentence.
        scores: Metric (`global.liver.dice`) to its value in that round.
        rows: Rows of the card's table: scope, region, metric, value, interval, cases.
        versions: Name to version.
    """

    name: str
    run: str = ""
    round: str = ""
    license: str
    authors: str
    data: str = UNTOLD
    phantoms: bool = False
    privacy: str = UNTOLD
    scores: Mapping[str, float] = field(default_factory=dict)
    rows: tuple[tuple[str, ...], ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)


def facts_of(
    name: str, notes: Mapping[str, str], folder: Path | None, *, license: str, authors: str
) -> Facts:
    """Collect the facts of a model file.

    Args:
        name: Name of the bundle.
        notes: Metadata of the model file.
        folder: Folder of its run; None where there is none.
        license: Of the weights.
        authors: Who made them.

    Raises:
        StudyError: The folder is no run.
    """
    origin = {"run": notes.get("run", ""), "round": notes.get("round", "")}
    if folder is not None:
        return _of_run(name, read_run(folder), origin, license=license, authors=authors)
    phantoms = notes.get("data") == "phantoms"
    return Facts(
        name=name,
        run=origin["run"],
        round=origin["round"],
        license=license,
        authors=authors,
        phantoms=phantoms,
        data="Phantoms (synthetic CT)" if phantoms else UNTOLD,
        privacy="Phantoms are nobody's: nothing was spent" if phantoms else UNTOLD,
    )


def evaluation_rows(path: Path) -> tuple[tuple[str, ...], ...]:
    """Read what `fedseg evaluate --json` printed, as rows of the card's table.

    Raises:
        DataError: It can't be read.
    """
    try:
        content = table(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        raise DataError(f"{path}: no JSON of `fedseg evaluate --json`; make it so") from None
    found = dict(scores(content.get("all")))
    for key, ends in table(content.get("intervals")).items():
        if isinstance(ends, list) and len(ends) == 2:
            found |= scores({f"{key}.low": ends[0], f"{key}.high": ends[1]})
    rows = tuple(_rows(path.stem, found))
    if not rows:
        raise DataError(f"{path}: no metrics in it; give what `fedseg evaluate --json` printed")
    return rows


def _of_run(name: str, run: Run, origin: Mapping[str, str], *, license: str, authors: str) -> Facts:
    lines = {str(line.number): line for line in run.rounds}
    line = lines.get(origin["round"])
    scopes = line.scopes if line else {}
    rows = [row for scope, title in SCOPES.items() for row in _rows(title, scopes.get(scope, {}))]
    phantoms = text(table(run.config.get("data")).get("source")) == "phantom" and all(
        table(site).get("simulated") is True for site in table(run.manifest.get("sites")).values()
    )
    return Facts(
        name=name,
        run=origin["run"] or run.id,
        round=origin["round"],
        license=license,
        authors=authors,
        data=_data(run, phantoms),
        phantoms=phantoms,
        privacy=_privacy(run),
        scores={
            f"{scope}.{key}": round(value, 4)
            for scope, part in scopes.items()
            for key, value in part.items()
            if key.endswith(".dice")
        },
        rows=tuple(rows),
        versions={
            "fedseg": text(run.manifest.get("fedseg")),
            **{key: text(value) for key, value in table(run.manifest.get("packages")).items()},
            "code, SHA-256": text(run.manifest.get("code_sha256")),
        },
    )


def _rows(title: str, found: Scores) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for region in REGIONS:
        for metric in METRICS:
            key = f"{region}.{metric}"
            if key in found:
                ends = [found.get(f"{key}.{end}") for end in ("low", "high")]
                interval = " to ".join(f"{end:.3f}" for end in ends if end is not None)
                cases = f"{found.get(f'{key}.cases', found.get('cases', 0)):.0f}"
                rows.append((title, region, metric, f"{found[key]:.3f}", interval or "-", cases))
    return rows


def _data(run: Run, phantoms: bool) -> str:
    cases: dict[str, float] = {}
    for line in run.rounds:
        for name, site in line.sites.items():
            cases[name] = max(cases.get(name, 0), site.training.get("cases", 0))
    kind = "phantoms (synthetic CT)" if phantoms else "cases"
    trained = [count for count in cases.values() if count]
    total, sites = sum(trained), len(trained)
    note = ", ".join(f"{count:.0f}" for count in sorted(trained, reverse=True))
    if not trained:  # with secure aggregation a round's sum is all that is known
        sums = ((line.sums.get("cases", 0.0), line.summed) for line in run.rounds)
        total, sites = max(sums, default=(0.0, 0))
        note = "the largest sum of a round"
    if not total:
        return UNTOLD
    return (
        f"{total:.0f} {kind} at {sites} sites ({note}), over "
        f"{max((line.number for line in run.rounds), default=0)} rounds; no scan left its site"
    )


def _privacy(run: Run) -> str:
    lines = [line for line in run.rounds if line.privacy]
    if not run.rounds:
        return UNTOLD
    if not lines:
        return "No differential privacy was used, so no bound is known of what the weights tell"
    mode = text(table(run.config.get("privacy")).get("mode"))
    protects = f"{mode}, which protects {MEMBERS[mode]}: " if mode in MEMBERS else ""
    return f"{protects}{spent_words(lines[-1].privacy or {})}, up to round {lines[-1].number}"
