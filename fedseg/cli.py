"""The command line: each command is a thin print over a public function."""

import json
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fedseg import __version__
from fedseg.errors import ConfigError, DataError, FedSegError
from fedseg.logs import show_logs

if TYPE_CHECKING:
    import torch

__all__ = ["app", "main"]

app = typer.Typer(
    name="fedseg",
    help="Federated liver and liver-tumour segmentation; `flwr run` trains, this does the rest.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
ModelFile = Annotated[Path, typer.Option("--model", help="A model-best.safetensors of a run.")]
CustomCode = Annotated[
    bool,
    typer.Option("--allow-custom-code", help="Import the network a model file names as its own."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
ModalityName = Annotated[str, typer.Option(help="auto, ct or mr.")]


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


@app.command()
def phantom(
    out: Annotated[Path, typer.Argument(help="Folder to write; one sub-folder a site.")],
    sites: Annotated[int, typer.Option(min=1, max=1000, help="Number of sites.")] = 3,
    cases: Annotated[int, typer.Option(min=1, max=10000, help="Cases a site.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Seed.")] = 0,
    kinds: Annotated[str, typer.Option(help="Kinds, one a site in turn; empty: all.")] = "",
) -> None:
    """Write phantom sites: synthetic CT with liver and tumour masks, each site its own kind."""
    from fedseg.data.phantom import KINDS, phantom_seeds, write_phantom_site

    names = [name.strip() for name in kinds.split(",")] if kinds else list(KINDS)
    for name in names:
        if name not in KINDS:
            raise ConfigError(f"--kinds: got '{name}'; expected some of {', '.join(KINDS)}")
    for site in range(sites):
        kind = KINDS[names[site % len(names)]]
        seeds = phantom_seeds(seed, site, cases)
        try:
            write_phantom_site(out / f"site-{site}", kind, seeds, name=f"site-{site}")
        except OSError as error:
            raise DataError(
                f"{out}: can't be written ({error.strerror}); free space or give another folder"
            ) from None
        print(f"{out / f'site-{site}'}: {cases} cases of kind {kind.name}")


@app.command()
def check(
    directory: Annotated[Path, typer.Argument(help="A site's folder.")],
    as_json: Json = False,
) -> None:
    """Check a site's folder: exit 0 clean (notes are), 1 problems found, 2 unusable arguments."""
    from fedseg.data.checks.check import check_folder
    from fedseg.site_config import load_site_config

    def show(done: int, cases: int) -> None:
        if sys.stderr.isatty():
            end = "\r" if done < cases else "\r\033[K"
            print(f"{done} of {cases} cases", end=end, file=sys.stderr, flush=True)

    report = check_folder(directory, load_site_config({}, folder=directory), on_case=show)
    if as_json:
        print(json.dumps(report.to_json(), indent=2))
    else:
        for finding in report.findings:
            print(finding)
        if report.findings:
            counts = report.counts.items()
            print(", ".join(f"{n} {name}{'s' if n != 1 else ''}" for name, n in counts))
        print(report.summary)
    raise typer.Exit(0 if report.clean else 1)


@app.command()
def fingerprint(
    directory: Annotated[Path, typer.Argument(help="A site's folder.")],
) -> None:
    """Print the very bytes that a study would get to know about this folder, and nothing else."""
    from fedseg.config import StudyConfig
    from fedseg.data.measure import site_fingerprint
    from fedseg.data.node import open_site

    site = open_site({"data-dir": str(directory)}, StudyConfig())
    sys.stdout.write(site_fingerprint(site).to_json())


@app.command()
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
        device=_device(device),
        modality=_modality(modality),
        overwrite=overwrite,
        on_scan=show,
    )
    raise typer.Exit(1 if any(result.problem for result in results) else 0)


@app.command()
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
    result = evaluate_folder(network, plan, directory, device=_device(device))
    if as_json:
        print(json.dumps(result.to_json(), indent=2))
    else:
        print(metric_table(str(directory), result.columns()), end="")
        for problem in result.skipped:
            print(f"skipped: {problem}", file=sys.stderr)
    raise typer.Exit(1 if result.skipped else 0)


def _device(name: str) -> "torch.device":
    from fedseg.segmentation.training import choose_device
    from fedseg.site_config import valid_device

    if not valid_device(name):
        raise ConfigError(f"--device: got '{name}'; expected auto, cpu, cuda, cuda:N or mps")
    return choose_device(name)


def _modality(name: str) -> Literal["auto", "ct", "mr"]:
    known: dict[str, Literal["auto", "ct", "mr"]] = {"auto": "auto", "ct": "ct", "mr": "mr"}
    if name not in known:
        raise ConfigError(f"--modality: got '{name}'; expected auto, ct or mr")
    return known[name]
