"""The command evaluate."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from fedseg.commands.options import CustomCode, Device, Json, ModelFile, device_of

__all__ = ["evaluate"]


def evaluate(
    directory: Annotated[Path, typer.Argument(help="A site's folder.")],
    model: ModelFile,
    device: Device = "auto",
    custom: CustomCode = False,
    as_json: Json = False,
) -> None:
    """Score a model on a folder's cases, in each scan's own grid."""
    from fedseg.report.table import metric_table
    from fedseg.segmentation.evaluation import evaluate_folder
    from fedseg.segmentation.model_file import load_model
    from fedseg.segmentation.training import set_threads

    set_threads(None)
    network, plan = load_model(model, allow_custom_code=custom)
    result = evaluate_folder(network, plan, directory, device=device_of(device))
    if as_json:
        print(json.dumps(result.to_json(), indent=2))
    else:
        print(metric_table(str(directory), result.columns()), end="")
        for problem in result.skipped:
            print(f"skipped: {problem}", file=sys.stderr)
    raise typer.Exit(1 if result.skipped else 0)
