"""Read a run folder's files, whatever state they are in: running, cut off, or partly gone."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fedseg.config import StudyConfig
from fedseg.errors import StudyError
from fedseg.federation.history import in_words, score
from fedseg.report.run import Model, Picture, Round, Run, Scores, SiteRound

__all__ = ["find_run", "number", "read_run", "scores", "table", "text"]

_MAX_BYTES = 256 * 2**20
"""No file that is read whole is larger."""

_LARGEST = 1e18
"""What is beyond it can't be a metric, bytes or seconds; NaN isn't within either."""


def find_run(name: str, root: Path | None = None) -> Path:
    """Find a run by its id, its folder, or `latest`.

    Args:
        name: What a user typed.
        root: Where runs are; None: `output.dir`'s default.

    Raises:
        StudyError: There is no such run.
    """
    root = Path(StudyConfig().output.dir if root is None else root).expanduser().absolute()
    for path in (Path(name).expanduser().absolute(), root / name):
        if path.is_dir() and any(
            (path / file).is_file() for file in ("manifest.json", "history.jsonl", "config.json")
        ):
            return path.resolve()
    raise StudyError(
        f"run: got '{name}', no run folder here or in {root}; expected a run's id, its folder or "
        "latest"
    )


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        StudyError: It isn't one.
    """
    folder = find_run(str(folder), folder.parent)
    problems: list[str] = []
    config = _json(folder / "config.json", problems)
    manifest = _json(folder / "manifest.json", problems)
    comparison = _json(folder / "comparison.json", problems, optional=True)
    federation = table(config.get("federation"))
    monitor = text(federation.get("monitor"))
    return Run(
        folder=folder,
        id=text(manifest.get("run")) or folder.name,
        config=config,
        plan=_json(folder / "plan.json", problems),
        manifest=manifest,
        rounds=_rounds(folder / "history.jsonl", monitor, problems),
        compared={key: scores(row) for key, row in table(comparison.get("rows")).items()},
        matrix=_two_deep(comparison.get("matrix")),
        everywhere=_two_deep(comparison.get("per_site")),
        differences=_two_deep(comparison.get("differences")),
        wanted_rounds=int(number(federation.get("rounds")) or 0),
        steps=number(comparison.get("steps")),
        models=_models(folder, table(manifest.get("sha256"))),
        pictures=_pictures(folder / "pictures", problems),
        problems=problems,
    )


def number(value: object) -> float | None:
    """Return a number of a sane size, None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if -_LARGEST <= value <= _LARGEST else None


def text(value: object) -> str:
    """Return a string, `""` for anything else."""
    return value if isinstance(value, str) else ""


def table(value: object) -> dict[str, Any]:
    """Return a JSON object, an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def scores(value: object) -> Scores:
    """Keep the finite numbers of a JSON object."""
    found = {key: number(entry) for key, entry in table(value).items()}
    return {key: entry for key, entry in found.items() if entry is not None}


def _two_deep(value: object) -> dict[str, dict[str, Scores]]:
    return {
        key: {other: scores(cell) for other, cell in table(row).items()}
        for key, row in table(value).items()
    }


def _bytes(path: Path, problems: list[str], *, optional: bool = False) -> bytes:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise OSError(0, "too large")
        return path.read_bytes()
    except OSError as error:
        if not (optional and isinstance(error, FileNotFoundError)):
            problems.append(f"{path.name}: {(error.strerror or 'unreadable').lower()}")
        return b""


def _json(path: Path, problems: list[str], *, optional: bool = False) -> dict[str, Any]:
    content = _bytes(path, problems, optional=optional)
    if not content:
        return {}
    try:
        return table(json.loads(content))
    except (ValueError, RecursionError):
        problems.append(f"{path.name}: damaged")
        return {}


def _rounds(path: Path, monitor: str, problems: list[str]) -> list[Round]:
    found: dict[int, Round] = {}
    lines = _bytes(path, problems).split(b"\n")
    for position, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            content = table(json.loads(line))
            count = content["round"]
        except (ValueError, KeyError, RecursionError):
            count = None
        if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= 10**6:
            # A run that is still writing, or was killed while it did.
            cut = "cut off" if position == len(lines) else "damaged"
            problems.append(f"{path.name}: line {position} is {cut} and left out")
            continue
        found[count] = _round(content, count, monitor)
    return [found[key] for key in sorted(found)]


def _round(line: Mapping[str, Any], count: int, monitor: str) -> Round:
    names = ("global", "unseen", "federated")
    scopes = {name: scores(line.get(name)) for name in names}
    privacy, secagg = line.get("privacy"), table(line.get("secagg"))
    return Round(
        number=count,
        scopes={name: part for name, part in scopes.items() if part},
        sites={name: _site(table(site)) for name, site in sorted(table(line.get("sites")).items())},
        seconds=number(line.get("seconds")) or 0.0,
        bytes_up=number(line.get("bytes_up")) or 0.0,
        bytes_down=number(line.get("bytes_down")) or 0.0,
        privacy=scores(privacy) if isinstance(privacy, dict) else None,
        late=_late(line.get("late")),
        score=score(scopes, monitor),
        failed=text(line.get("failed")),
        summed=int(number(secagg.get("summed")) or 0),
        sums=scores(secagg.get("sums")),
    )


def _late(value: object) -> list[tuple[str, int, bool]]:
    entries = [table(entry) for entry in value] if isinstance(value, list) else []
    return [
        (text(entry.get("site")), int(number(entry.get("round")) or 0), entry.get("used") is True)
        for entry in entries
    ]


def _site(site: Mapping[str, Any]) -> SiteRound:
    status = text(site.get("status")) or "evaluated"
    why = in_words(text(site.get("reason")), text(site.get("detail")))
    return SiteRound(
        status=status,
        why="" if status in ("ok", "evaluated") else why,
        weight=number(site.get("weight")) or 0.0,
        seconds=number(site.get("seconds")) or 0.0,
        bytes_up=number(site.get("bytes_up")) or 0.0,
        training=scores(site.get("training")),
        metrics=scores(site.get("metrics")),
    )


def _models(folder: Path, hashes: Mapping[str, Any]) -> list[Model]:
    found = []
    for path in sorted(folder.glob("model-*.safetensors")):
        try:
            with safe_open(path, framework="np") as file:
                notes = dict(file.metadata() or {})
            size = os.stat(path).st_size
        except (SafetensorError, OSError):
            continue
        found.append(
            Model(
                name=path.name,
                round=text(notes.get("round")),
                bytes=size,
                sha256=text(hashes.get(path.name)),
            )
        )
    return found


def _pictures(folder: Path, problems: list[str]) -> list[Picture]:
    found = []
    listed = _json(folder / "pictures.json", problems, optional=True).get("pictures")
    for entry in map(table, listed if isinstance(listed, list) else []):
        # A name with a folder in it would read files from elsewhere.
        scan, overlay = (
            _bytes(folder / Path(text(entry.get(key))).name, problems) if entry.get(key) else b""
            for key in ("scan", "overlay")
        )
        if overlay.startswith(b"\x89PNG") and scan.startswith(b"\x89PNG"):
            found.append(
                Picture(
                    title=text(entry.get("title")),
                    case=text(entry.get("case")),
                    scan=scan,
                    overlay=overlay,
                    dice=scores(entry.get("dice")),
                )
            )
    return found
