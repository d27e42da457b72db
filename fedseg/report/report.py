"""Write `report.html`: one file that opens without network, made from the run folder alone."""

import base64
import functools
from pathlib import Path
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from fedseg.data.whole_file import replace_file
from fedseg.errors import StudyError
from fedseg.report.alone import compared, differences, matrices
from fedseg.report.amounts import UNDEFINED
from fedseg.report.costs import costs, privacy, totals
from fedseg.report.headline import REGION_NAMES, headline
from fedseg.report.lesion_tables import lesion_notes, lesion_tables
from fedseg.report.page import TEMPLATES
from fedseg.report.per_site import absences, notes, site_table, spread
from fedseg.report.provenance import config_rows, model_rows, plan_rows, version_rows
from fedseg.report.quality import Table, curves, metrics
from fedseg.report.run import Picture, Run, Scores
from fedseg.report.run_files import read_run, text
from fedseg.report.style import STYLE

__all__ = ["render", "write_page", "write_report", "write_site_report"]


def write_report(run_folder: Path) -> Path:
    """Write `report.html` of a finished, running or broken run into its folder.

    Raises:
        StudyError: It is no run folder, or can't be written.
    """
    run = read_run(run_folder)
    return write_page(run.folder / "report.html", render(run))


def write_page(path: Path, content: str) -> Path:
    """Write a page atomically and return its path.

    Raises:
        StudyError: It can't be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise StudyError(
            f"{path}: can't be written ({error.strerror}); free space or allow it"
        ) from None
    return path


def render(run: Run) -> str:
    """Make the page of a run."""
    missing, more = absences(run)
    status = run.manifest.get("status")
    return _page(
        "report",
        run=run,
        best=run.best,
        unfinished=status == "running",
        failed=text(run.manifest.get("error")).rstrip(".") or True if status == "failed" else "",
        headline=headline(run),
        totals=totals(run),
        curves=curves(run),
        compared=[table for table in (compared(run), differences(run)) if table],
        matrices=matrices(run),
        sites=site_table(run),
        spread=[*spread(run), *notes(run)],
        pictures=[_embedded(picture) for picture in run.pictures],
        metrics=metrics(run),
        lesions=lesion_tables(run),
        lesion_notes=lesion_notes(run),
        costs=costs(run),
        absences=[(row["round"], row["site"], row["status"], row["why"]) for row in missing],
        more=more,
        privacy=privacy(run),
        plan=plan_rows(run),
        models=model_rows(run),
        versions=version_rows(run),
        config=config_rows(run),
    )


def write_site_report(
    path: Path, *, site: str, run_id: str, round_number: int, table: Table, pictures: list[Picture]
) -> Path:
    """Write a site's own report: its metrics and pictures, which never leave it.

    Raises:
        StudyError: It can't be written.
    """
    content = _page(
        "site",
        site=site,
        run_id=run_id,
        round=round_number,
        metrics=table,
        pictures=[_embedded(picture) for picture in pictures],
    )
    return write_page(path, content)


def _page(name: str, **content: Any) -> str:
    template = _environment().get_template(name)
    return template.render(style=Markup(STYLE), **content).lstrip() + "\n"


@functools.cache
def _environment() -> Environment:
    return Environment(loader=DictLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)


def _embedded(picture: Picture) -> dict[str, str]:
    return {
        "title": picture.title,
        "case": picture.case,
        "scan": _data_uri(picture.scan),
        "overlay": _data_uri(picture.overlay),
        "dice": _dice_in_words(picture.dice),
    }


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _dice_in_words(dice: Scores) -> str:
    found = [
        f"{name} {dice[region]:.3f}" if region in dice else f"{name} {UNDEFINED}"
        for region, name in REGION_NAMES.items()
    ]
    return ", ".join(found)
