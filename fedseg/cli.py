"""The command line: each command is a thin print over a public function."""

import sys
from io import TextIOWrapper
from typing import Annotated

import typer

from fedseg import __version__
from fedseg.commands.audit import audit
from fedseg.commands.compare import compare
from fedseg.commands.data import check, fingerprint, phantom
from fedseg.commands.evaluate import evaluate
from fedseg.commands.export import export
from fedseg.commands.predict import predict
from fedseg.commands.privacy import privacy
from fedseg.commands.report import report
from fedseg.commands.sign import hub, sign
from fedseg.commands.watch import watch
from fedseg.errors import FedSegError
from fedseg.logs import show_logs

__all__ = ["app", "main"]

app = typer.Typer(
    name="fedseg",
    help="Federated liver and liver-tumour segmentation; `flwr run` trains, this does the rest.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Run the command line; errors are one line, `--debug` shows where they came from."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    show_logs()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # file names may have bytes that are no UTF-8
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except FedSegError as error:
        if debug:
            raise
        print(f"fedseg: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if debug or error.filename is None:
            raise
        print(f"fedseg: {error.filename}: {error.strerror}; mend it and run again", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(f"fedseg {__version__}")
        raise typer.Exit


for command in (
    *(phantom, check, fingerprint, predict, evaluate, compare, export, report, watch),
    *(audit, sign, hub),
):
    app.command()(command)
app.add_typer(privacy, name="privacy")
