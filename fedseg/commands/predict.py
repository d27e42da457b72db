"""The command predict."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from fedseg.commands.options import (
    CustomCode,
    Device,
    ModalityName,
    ModelFile,
    device_of,
    modality_of,
)

__all__ = ["predict"]


def predict(
    images: Annotated[
        list[Path], typer.Argument(help="Scans (.nii, .nii.gz, DICOM series) or folders.")
    ],
    model: ModelFile,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the masks.")],
    device: Device = "auto",
    modality: ModalityName = "auto",
    custom: CustomCode = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace masks.")] = False,
) -> None:
    """Write a mask (1 liver, 2 tumor) for each scan, on the scan's own grid."""
    from fedseg.segmentation.model_file import load_model
    from fedseg.segmentation.predict import Prediction, predict_files, scans_of
    from fedseg.segmentation.training import set_threads

    set_threads(None)
    network, plan = load_model(model, allow_custom_code=custom)
    scans = scans_of(images)

    def show(result: Prediction) -> None:
        if result.problem:
            print(f"skipped: {result.problem}", file=sys.stderr)
        else:
            volumes = ", ".join(f"{k} {v:.0f} mL" for k, v in result.volumes_ml.items())
            print(f"{result.mask}: {volumes}")

    results = predict_files(
        network,
        plan,
        scans,
        out,
        device=device_of(device),
        modality=modality_of(modality),
        overwrite=overwrite,
        on_scan=show,
    )
    raise typer.Exit(1 if any(result.problem for result in results) else 0)
