"""The command watch."""

import time
from typing import Annotated

import typer

from fedseg.commands.options import Runs

__all__ = ["watch"]


def watch(
    run: Annotated[str, typer.Argument(help="A run's id or folder, or latest.")] = "latest",
    runs: Runs = None,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Show how it stands, and end.")] = False,
) -> None:
    """Follow a run while it goes on: curves, sites, time left. Ends with the run: 0 well, 1 not."""
    from rich.console import Console
    from rich.live import Live

    from fedseg.report.live import follow, view
    from fedseg.report.run_files import find_run, read_run

    folder = find_run(run, runs)
    console = Console()
    if once or not console.is_terminal:
        found = read_run(folder)
        console.print(view(found))
    else:
        with Live(console=console, auto_refresh=False) as live:
            found = follow(
                folder,
                lambda drawn: live.update(drawn, refresh=True),
                lambda: time.sleep(every),
            )
    raise typer.Exit(1 if found.manifest.get("status") == "failed" else 0)
