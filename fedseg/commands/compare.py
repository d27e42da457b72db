"""The command compare."""

import json
from pathlib import Path
from typing import Annotated

import typer

from fedseg.commands.options import CustomCode, Device, Json, Runs, device_of

__all__ = ["compare"]


def compare(
    run: Annotated[str, typer.Argument(help="A run's id or folder, or latest.")] = "latest",
    sites: Annotated[
        Path | None,
        typer.Option(help="Folder of site folders; without: the simulated sites of the study."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of each model; without: as in the run.")
    ] = None,
    runs: Runs = None,
    device: Device = "auto",
    custom: CustomCode = False,
    as_json: Json = False,
) -> None:
    """Train each site alone, and all data in one place, and compare with a simulated run's model.

    Writes comparison.json into the run's folder, where `fedseg report` finds it.
    """
    from fedseg.federation.compare_run import compare_run
    from fedseg.report.comparison_table import comparison_text
    from fedseg.report.run_files import find_run
    from fedseg.segmentation.training import set_threads

    set_threads(None)
    folder = find_run(run, runs)
    found = compare_run(
        folder,
        device=device_of(device),
        sites=sites.expanduser() if sites else None,
        steps=steps,
        allow_custom_code=custom,
    )
    print(json.dumps(found, indent=2) if as_json else comparison_text(found), end="")
    if not as_json:
        print(f"Written: {folder / 'comparison.json'}; `fedseg report` takes it in")
