"""The command report."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["report"]


def report(
    run: Annotated[str, typer.Argument(help="A run's id or folder, or latest.")] = "latest",
    runs: Annotated[
        Path | None, typer.Option("--runs", help="Where runs are, if not in ~/.fedseg/runs.")
    ] = None,
) -> None:
    """Write report.html of a run, from the files in its folder alone."""
    from fedseg.report.report import write_report
    from fedseg.report.run_files import find_run

    print(write_report(find_run(run, runs)))
