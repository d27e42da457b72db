"""The command report."""

from typing import Annotated

import typer

from fedseg.commands.options import Runs

__all__ = ["report"]


def report(
    run: Annotated[str, typer.Argument(help="A run's id or folder, or latest.")] = "latest",
    runs: Runs = None,
) -> None:
    """Write report.html of a run, from the files in its folder alone."""
    from fedseg.report.report import write_report
    from fedseg.report.run_files import find_run

    print(write_report(find_run(run, runs)))
