"""Options that several commands share, and how their text is read."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fedseg.errors import ConfigError

if TYPE_CHECKING:
    import torch

__all__ = [
    "CustomCode",
    "Device",
    "Json",
    "LargestLiver",
    "ModalityName",
    "ModelFile",
    "Runs",
    "TumorInLiver",
    "device_of",
    "modality_of",
]

LargestLiver = Annotated[bool, typer.Option(help="Keep only the largest piece of liver.")]
TumorInLiver = Annotated[
    bool, typer.Option("--tumor-in-liver", help="Drop tumours that don't touch the liver.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
ModelFile = Annotated[Path, typer.Option("--model", help="A model file, a run, or demo.")]
Runs = Annotated[
    Path | None, typer.Option("--runs", help="Where runs are, if not in ~/.fedseg/runs.")
]
CustomCode = Annotated[
    bool,
    typer.Option("--allow-custom-code", help="Import the network a model file names as its own."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
ModalityName = Annotated[str, typer.Option(help="auto, ct or mr.")]


def device_of(name: str) -> "torch.device":
    """Choose the device of `--device`.

    Raises:
        ConfigError: No such device.
    """
    from fedseg.segmentation.training import choose_device
    from fedseg.site_config import valid_device

    if not valid_device(name):
        raise ConfigError(f"--device: got '{name}'; expected auto, cpu, cuda, cuda:N or mps")
    return choose_device(name)


def modality_of(name: str) -> Literal["auto", "ct", "mr"]:
    """Read `--modality`.

    Raises:
        ConfigError: No such modality.
    """
    known: dict[str, Literal["auto", "ct", "mr"]] = {"auto": "auto", "ct": "ct", "mr": "mr"}
    if name not in known:
        raise ConfigError(f"--modality: got '{name}'; expected auto, ct or mr")
    return known[name]
