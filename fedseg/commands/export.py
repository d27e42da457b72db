"""The command export."""

from pathlib import Path
from typing import Annotated

import typer

from fedseg.commands.options import ModalityName, modality_of

__all__ = ["export"]


def export(
    source: Annotated[
        str, typer.Argument(metavar="RUN", help="A run's id or folder, a model file, or demo.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the bundle.")],
    onnx: Annotated[bool, typer.Option("--onnx", help="Also write ONNX (fedseg[onnx]).")] = False,
    license: Annotated[
        str, typer.Option(help="Licence of the weights.")
    ] = "not stated; ask who made the run",
    authors: Annotated[str, typer.Option(help="Who made the weights.")] = "not stated",
    modality: ModalityName = "auto",
    scores: Annotated[
        Path | None, typer.Option(help="Of `fedseg evaluate --json`: for the model card.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a bundle.")] = False,
) -> None:
    """Write a MONAI bundle: it runs by `python -m monai.bundle run`, without fedseg."""
    from fedseg.bundle.export import export_bundle

    bundle = export_bundle(
        source,
        out,
        onnx=onnx,
        overwrite=overwrite,
        license=license,
        authors=authors,
        modality=modality_of(modality),
        scores=scores,
    )
    print(f"Bundle: {bundle}; model card: {bundle / 'docs' / 'README.md'}")
