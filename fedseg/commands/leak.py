"""The command leak."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedseg.commands.options import CustomCode, Device, Json, device_of
from fedseg.errors import DataError

if TYPE_CHECKING:
    from fedseg.privacy.leakage import LeakReport

__all__ = ["leak"]


def leak(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")],
    data: Annotated[
        Path | None, typer.Option(help="A folder of cases, any layout; without: phantoms.")
    ] = None,
    model: Annotated[
        str,
        typer.Option(help="A built-in network, or a model file or run to start from."),
    ] = "unet",
    sites: Annotated[int, typer.Option(min=3, max=100, help="Sites.")] = 3,
    cases: Annotated[int, typer.Option(min=4, max=10000, help="Phantoms of each.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of the short study.")] = 6,
    steps: Annotated[int, typer.Option(min=1, help="Steps of a site in a round.")] = 16,
    clip: Annotated[
        float, typer.Option(min=1e-6, help="Clip norm, as a share of an update's norm.")
    ] = 0.5,
    noise: Annotated[
        float, typer.Option(min=0, help="Noise multiplier of differential privacy.")
    ] = 1.0,
    iterations: Annotated[int, typer.Option(min=1, help="Steps of a reconstruction.")] = 300,
    seed: Annotated[int, typer.Option(min=0, help="Decides everything.")] = 0,
    device: Device = "auto",
    custom: CustomCode = False,
    as_json: Json = False,
) -> None:
    """Attack a short study's own updates: who was in the training, and what does a patch show?

    Membership inference and gradient inversion, under none, clipping, local and central
    differential privacy and secure aggregation. Writes leak.json, leak.txt and
    reconstructions.png. A LOWER bound on the risk: a failed attack proves nothing. With --data the
    picture shows a part of a scan: keep it where the scans are.
    """
    from fedseg.data.measure import site_fingerprint
    from fedseg.data.planning import make_plan
    from fedseg.privacy.leak_sites import cohorts_of, open_sites, small_study
    from fedseg.privacy.leakage import leak_test
    from fedseg.privacy.rehearsal import LeakOptions, Rehearsal
    from fedseg.report.leak_table import leak_text
    from fedseg.segmentation.model_file import load_model
    from fedseg.segmentation.models import MODELS
    from fedseg.segmentation.training import set_threads

    set_threads(None)
    place = device_of(device)
    built_in = model in MODELS
    start = None if built_in else load_model(Path(model), allow_custom_code=custom)
    study = small_study(model=model if built_in else "unet", seed=seed, folder=data)
    found = open_sites(study, sites=sites, cases=cases)
    plan = start[1] if start else make_plan(study, [site_fingerprint(site) for site in found])
    options = LeakOptions(
        rounds=rounds,
        steps=steps,
        clip=clip,
        noise_multiplier=noise,
        iterations=iterations,
        seed=seed,
    )
    cohorts = cohorts_of(found, plan, seed=seed)
    test = Rehearsal(study=study, plan=plan, cohorts=cohorts, options=options, device=place)
    report = leak_test(test, state=start[0].state_dict() if start else None)
    _write(out, report)
    text = json.dumps(report.to_json(), indent=2) + "\n" if as_json else leak_text(report)
    print(text, end="")
    if not as_json:
        print(f"Written: {out / 'leak.json'}, leak.txt, reconstructions.png")


def _write(out: Path, report: "LeakReport") -> None:
    from fedseg.data.whole_file import replace_file
    from fedseg.report.leak_table import leak_text
    from fedseg.segmentation.slices import draw_slices

    picture = draw_slices(
        list(report.images.values()), window=(-2.0, 2.0), spacing=report.facts["spacing"]
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
        replace_file(out / "leak.json", (json.dumps(report.to_json(), indent=2) + "\n").encode())
        replace_file(out / "leak.txt", leak_text(report).encode())
        replace_file(out / "reconstructions.png", picture)
    except OSError as error:
        raise DataError(
            f"{out}: can't be written ({error.strerror}); free space or give another folder"
        ) from None
