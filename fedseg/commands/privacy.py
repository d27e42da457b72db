"""The commands under `fedseg privacy`."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedseg.commands.options import Json
from fedseg.errors import ConfigError

if TYPE_CHECKING:
    from fedseg.config import StudyConfig
    from fedseg.privacy.forecast import Forecast

__all__ = ["privacy"]

privacy = typer.Typer(help="What differential privacy costs, before anything runs.")


@privacy.callback()
def _group() -> None:
    """Keep `plan` a command of its own while there is no other."""


@privacy.command()
def plan(
    app: Annotated[Path, typer.Argument(help="Folder of the app, as for flwr run.")] = Path("."),
    config: Annotated[
        list[str] | None,
        typer.Option("--run-config", "-c", help="Overrides, as for flwr run."),
    ] = None,
    sites: Annotated[
        int | None, typer.Option(min=1, help="Sites of a round; without: federation.sites.")
    ] = None,
    parameters: Annotated[
        int | None, typer.Option(min=1, help="Shared parameters; without: those of model.name.")
    ] = None,
    cases: Annotated[
        int | None, typer.Option(min=1, help="Training cases of a site, for record-dp.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Foretell epsilon, noise and what is left of the update; exit 1 where that is absurd."""
    from fedseg.data.planning import make_plan
    from fedseg.federation.privacy_check import shared_size
    from fedseg.federation.sites import wanted_sites
    from fedseg.privacy.forecast import forecast
    from fedseg.segmentation.models import build_model

    study = _study(app, config)
    planned = make_plan(study)
    count = sites or wanted_sites(study)
    if not count:
        raise ConfigError("federation.sites: got nothing; give --sites, or set it")
    if parameters is None:
        parameters = shared_size(build_model(planned), study)
    found = forecast(
        study,
        sites=count,
        parameters=parameters,
        batch_size=planned.batch_size,
        cases=cases,
    )
    print(_as_json(found) if as_json else "\n".join(_lines(found, study)))
    if found.absurd and not study.privacy.force:
        raise typer.Exit(1)


def _study(app: Path, overrides: list[str] | None) -> "StudyConfig":
    from click import ClickException
    from flwr.common.config import get_fused_config_from_dir, parse_config_args

    from fedseg.config import StudyConfig

    folder = app.expanduser().absolute()
    try:
        given = parse_config_args(overrides)
        merged: dict[str, Any] = dict(get_fused_config_from_dir(folder, given))
    except ClickException as error:
        raise ConfigError(f"--run-config: {error.message}") from None
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{folder}: no Flower app, or a key that it lacks ({error}); give the folder with "
            "FedSeg's pyproject.toml"
        ) from None
    return StudyConfig.from_run_config(merged)


def _as_json(found: "Forecast") -> str:
    return json.dumps(dataclasses.asdict(found), indent=2)


def _lines(found: "Forecast", study: "StudyConfig") -> list[str]:
    settings = study.privacy
    lines = [
        f"{found.mode} protects {found.member}: clip {settings.clip:g}, noise multiplier "
        f"{settings.noise_multiplier:g}, delta {found.delta:g}",
        f"{found.sites} sites, {found.parameters:,} shared parameters",
        *(f"epsilon after round {n}: {value:.3f}" for n, value in found.epsilons.items()),
    ]
    if found.paid is not None:
        lines.append(f"the budget of {settings.max_epsilon:g} pays for {found.paid} rounds")
    if found.ratio is None:
        lines.append("noise by update: not known without --cases, the training cases of a site")
    else:
        lines += [
            f"noise by update: at least {found.ratio:,.2f} (norms; all sites agree and reach the "
            "clip)",
            f"cosine of the noised and the true mean update: at most {found.cosine:.4f}",
            f"for a cosine of .3 it takes about {found.enough:,} sites",
        ]
    return [*lines, f"verdict: {'ABSURD, ' if found.absurd else ''}{found.verdict}"]
