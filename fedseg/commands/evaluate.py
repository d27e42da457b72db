"""The command evaluate."""

import csv
import json
import sys
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
from fedseg.errors import ConfigError

if TYPE_CHECKING:
    from fedseg.segmentation.evaluation import FolderScores

__all__ = ["evaluate"]


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

    set_threads(None)
    scoring = Scoring(tolerance_mm=tolerance, lesion_overlap=lesion_overlap)

    def score_masks(path: Path) -> "FolderScores":
        return evaluate_predictions(path, directory, scoring=scoring, seed=seed)

    def score_model(path: Path) -> "FolderScores":
        network, plan = load_model(path, allow_custom_code=custom)
        place = device_of(device)
        return evaluate_folder(
            network,
            plan,
            directory,
            device=place,
            largest_liver=largest_liver,
            tumor_in_liver=tumor_in_liver,
            scoring=scoring,
            seed=seed,
        )

    if model is not None and predictions is None:
        result = score_model(model)
    elif predictions is not None and model is None:
        result = score_masks(predictions)
    else:
        given = "both" if model else "neither"
        raise ConfigError(f"--model, --predictions: got {given}; expected exactly one of them")
    other = None
    if against is not None:
        masks = against.is_dir() and not find_model(against).is_file()
        other = (score_masks if masks else score_model)(against)
    if cases is not None:
        _write_cases(cases, result)
    (_print_json if as_json else _print_text)(str(directory), result, other, seed)
    raise typer.Exit(1 if result.skipped or (other and other.skipped) else 0)


def _write_cases(path: Path, result: "FolderScores") -> None:
    rows = result.rows()
    with path.open("w", newline="", encoding="utf-8") as file:
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
