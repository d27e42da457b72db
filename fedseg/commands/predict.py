"""The command predict."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedseg.commands.options import (
    CustomCode,
    Device,
    Json,
    LargestLiver,
    ModalityName,
    ModelFile,
    TumorInLiver,
    device_of,
    modality_of,
)
from fedseg.errors import ConfigError

if TYPE_CHECKING:
    from fedseg.segmentation.predict import Prediction

__all__ = ["predict", "progress_bar"]


def predict(
    images: Annotated[
        list[Path], typer.Argument(help="Scans (.nii, .nii.gz, DICOM series) or folders.")
    ],
    model: ModelFile,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for masks and volumes.csv.")],
    device: Device = "auto",
    modality: ModalityName = "auto",
    custom: CustomCode = False,
    flips: Annotated[
        str,
        typer.Option(help="Average over mirrored scans: x takes 2 times as long, xy 4, xyz 8."),
    ] = "",
    largest_liver: LargestLiver = True,
    tumor_in_liver: TumorInLiver = False,
    overlay: Annotated[
        bool, typer.Option("--overlay", help="Draw the mask on a slice, too (.png).")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace masks.")] = False,
    as_json: Json = False,
) -> None:
    """Write a mask (1 liver, 2 tumor) for each scan, on its own grid; go on where stopped."""
    from fedseg.data.scans import scans_of
    from fedseg.segmentation.model_file import load_model
    from fedseg.segmentation.predict import predict_files
    from fedseg.segmentation.training import set_threads

    set_threads(None)
    axes = _axes(flips)
    network, plan = load_model(model, allow_custom_code=custom)
    scans = scans_of(images)
    with progress_bar(len(scans)) as on_progress:
        results = predict_files(
            network,
            plan,
            scans,
            out,
            device=device_of(device),
            modality=modality_of(modality),
            flips=axes,
            largest_liver=largest_liver,
            tumor_in_liver=tumor_in_liver,
            overlay=overlay,
            overwrite=overwrite,
            on_scan=_print_json if as_json else _print_text,
            on_progress=on_progress,
        )
    raise typer.Exit(1 if any(result.problem for result in results) else 0)


def _axes(flips: str) -> list[int]:
    axes = ["xyz".find(letter) for letter in flips.lower()]
    if min(axes, default=0) < 0 or len(set(axes)) < len(axes):
        raise ConfigError(f"--flips: got '{flips}'; expected some of x, y, z, such as xyz")
    return axes


def _print_text(result: "Prediction") -> None:
    found = result.findings
    if found is None:
        print(f"skipped: {result.problem}", file=sys.stderr)
        return
    kept = "kept (--overwrite replaces it), " if result.kept else ""
    lesions = "1 lesion" if found.lesions == 1 else f"{found.lesions} lesions"
    tumor = f"tumor {found.tumor_ml:.0f} mL" + (f" in {lesions}" if found.lesions else "")
    print(f"{result.mask}: {kept}liver {found.liver_ml:.0f} mL, {tumor}", flush=True)


def _print_json(result: "Prediction") -> None:
    status = "skipped" if result.problem else "kept" if result.kept else "done"
    values = {
        "scan": str(result.scan),
        "mask": str(result.mask) if result.mask else None,
        "status": status,
        **(asdict(result.findings) if result.findings else {}),
        "seconds": result.seconds,
        "problem": result.problem,
    }
    print(json.dumps(values), flush=True)


@contextmanager
def progress_bar(scans: int) -> Iterator[Callable[[float], None] | None]:
    """Show scans done and time left, where somebody looks at a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        BarColumn(),
        TextColumn("{task.percentage:.0f}% of {task.total} scans, time left"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    # The lines for standard output go above the bar, unless they go into a file.
    with Progress(
        *columns, console=console, transient=True, redirect_stdout=sys.stdout.isatty()
    ) as bar:
        task = bar.add_task("", total=scans)
        yield lambda done: bar.update(task, completed=done)
