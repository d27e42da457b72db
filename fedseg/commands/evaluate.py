"""The command evaluate."""

import csv
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedseg.commands.options import (
    CustomCode,
    Device,
    Json,
    LargestLiver,
    TumorInLiver,
    device_of,
)
from fedseg.data.whole_file import writing
from fedseg.errors import ConfigError

if TYPE_CHECKING:
    from fedseg.segmentation.evaluation import FolderScores

__all__ = ["evaluate"]

_Score = Callable[[], "FolderScores"]


def evaluate(
    directory: Annotated[Path, typer.Argument(help="A site's folder.")],
    model: Annotated[
        Path | None, typer.Option("--model", help="A model file, a run, or demo.")
    ] = None,
    predictions: Annotated[
        Path | None, typer.Option(help="Folder of masks that exist, named as their cases.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="Second model, or folder of masks: a paired comparison.")
    ] = None,
    device: Device = "auto",
    custom: CustomCode = False,
    as_json: Json = False,
    cases: Annotated[Path | None, typer.Option(help="Write a table of single cases (CSV).")] = None,
    tolerance: Annotated[float, typer.Option(min=0, help="Of surface Dice (NSD), mm.")] = 2.0,
    lesion_overlap: Annotated[
        float, typer.Option(min=0, max=0.999, help="IoU over which a lesion is found.")
    ] = 0.5,
    seed: Annotated[int, typer.Option(min=0, help="Of the 95% intervals.")] = 0,
    largest_liver: LargestLiver = True,
    tumor_in_liver: TumorInLiver = False,
) -> None:
    """Score a model, or masks that exist, on a folder's cases, in each scan's own grid.

    A model's masks are cleaned as `fedseg predict` does; masks that exist are scored as they are.
    """
    from fedseg.segmentation.evaluation import evaluate_folder, evaluate_predictions
    from fedseg.segmentation.metrics import Scoring
    from fedseg.segmentation.model_file import find_model, load_model
    from fedseg.segmentation.training import set_threads
    from fedseg.site_config import load_site_config

    set_threads(None)
    scoring = Scoring(tolerance_mm=tolerance, lesion_overlap=lesion_overlap)

    def of_masks(path: Path) -> _Score:
        load_site_config({}, folder=path)
        return partial(evaluate_predictions, path, directory, scoring=scoring, seed=seed)

    def of_model(path: Path) -> _Score:
        return partial(
            evaluate_folder,
            *load_model(path, allow_custom_code=custom),
            directory,
            device=device_of(device),
            largest_liver=largest_liver,
            tumor_in_liver=tumor_in_liver,
            scoring=scoring,
            seed=seed,
        )

    # Scoring takes long: what can be wrong with the arguments is found before.
    if model is not None and predictions is None:
        score = of_model(model)
    elif predictions is not None and model is None:
        score = of_masks(predictions)
    else:
        given = "both" if model else "neither"
        raise ConfigError(f"--model, --predictions: got {given}; expected exactly one of them")
    score_other = None
    if against is not None:
        masks = against.is_dir() and not find_model(against).is_file()
        score_other = (of_masks if masks else of_model)(against)
    if cases is not None:
        _check_writable(cases)
    result, other = score(), score_other() if score_other else None
    (_print_json if as_json else _print_text)(str(directory), result, other, seed)
    if cases is not None:
        _write_cases(cases, result)
    raise typer.Exit(1 if result.skipped or (other and other.skipped) else 0)


def _check_writable(path: Path) -> None:
    with writing(path, kind="file"):
        new = not path.exists()
        path.open("a").close()
        if new:
            path.unlink()


def _write_cases(path: Path, result: "FolderScores") -> None:
    rows = result.rows()
    # A file name may have bytes that are no UTF-8.
    with (
        writing(path, kind="file"),
        path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _print_json(
    title: str, result: "FolderScores", other: "FolderScores | None", seed: int
) -> None:
    from fedseg.segmentation.intervals import paired_differences

    content = result.to_json()
    if other:
        found = paired_differences(result.cases, other.cases, seed=seed)
        content["against"] = {
            **other.to_json(),
            "differences": {key: entry.to_json() for key, entry in found.items()},
        }
    print(json.dumps(content, indent=2))


def _print_text(
    title: str, result: "FolderScores", other: "FolderScores | None", seed: int
) -> None:
    from fedseg.report.table import difference_table, lesion_table, scores_table
    from fedseg.segmentation.intervals import paired_differences

    print(scores_table(title, result.all, result.intervals), end="")
    if result.all["tumor.volume_ml.cases"]:  # somebody looked for tumours
        print(lesion_table("Tumours, one by one", result.all, result.intervals), end="")
    if other:
        found = paired_differences(result.cases, other.cases, seed=seed)
        print(difference_table("Difference on the same cases", found), end="")
    for problem in (*result.skipped, *(other.skipped if other else ())):
        print(f"skipped: {problem}", file=sys.stderr)
