"""Commands on a site's data: phantom, check, fingerprint."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from fedseg.commands.options import Json
from fedseg.errors import ConfigError, DataError

__all__ = ["check", "fingerprint", "phantom"]


def phantom(
    out: Annotated[Path, typer.Argument(help="Folder to write; one sub-folder a site.")],
    sites: Annotated[int, typer.Option(min=1, max=1000, help="Number of sites.")] = 3,
    cases: Annotated[int, typer.Option(min=1, max=10000, help="Cases a site.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Seed.")] = 0,
    kinds: Annotated[str, typer.Option(help="Kinds, one a site in turn; empty: all.")] = "",
) -> None:
    """Write phantom sites: synthetic CT with liver and tumour masks, each site its own kind."""
    from fedseg.data.phantom import KINDS, phantom_seeds, write_phantom_site
    from fedseg.data.phantom_sites import check_free

    names = [name.strip() for name in kinds.split(",")] if kinds else list(KINDS)
    for name in names:
        if name not in KINDS:
            raise ConfigError(f"--kinds: got '{name}'; expected some of {', '.join(KINDS)}")
    wanted = [KINDS[names[site % len(names)]] for site in range(sites)]
    notes = [f"phantoms of kind {kind.name}, {cases} cases, seed {seed}" for kind in wanted]
    for site, note in enumerate(notes):
        check_free(out / f"site-{site}", note)
    for site, (kind, note) in enumerate(zip(wanted, notes, strict=True)):
        folder, seeds = out / f"site-{site}", phantom_seeds(seed, site, cases)
        try:
            write_phantom_site(folder, kind, seeds, name=folder.name, note=note)
        except OSError as error:
            raise DataError(
                f"{out}: can't be written ({error.strerror}); free space or give another folder"
            ) from None
        print(f"{folder}: {cases} cases of kind {kind.name}")


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


def fingerprint(
    directory: Annotated[Path, typer.Argument(help="A site's folder.")],
) -> None:
    """Print the very bytes that a study would get to know about this folder, and nothing else."""
    from fedseg.config import StudyConfig
    from fedseg.data.measure import site_fingerprint
    from fedseg.data.node import open_site

    site = open_site({"data-dir": str(directory)}, StudyConfig())
    sys.stdout.write(site_fingerprint(site).to_json())
