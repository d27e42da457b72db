"""Go on with a killed or finished run: same folder, same config, next round."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from fedseg.config import StudyConfig
from fedseg.data.plan import Plan
from fedseg.errors import ConfigError, StudyError
from fedseg.federation.checkpoints import Checkpoint, load_checkpoint
from fedseg.federation.run_folder import RunFolder

__all__ = ["Resumed", "resume"]


_MAY_GROW = ("rounds", "connect_deadline", "round_deadline")


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """A run to go on with.

    Attributes:
        study: The config it began with, with what may change taken from the new one.
        plan: Its plan.
        folder: Its folder; the history there is that of the checkpoint.
        checkpoint: Where it stands.
    """

    study: StudyConfig
    plan: Plan
    folder: RunFolder
    checkpoint: Checkpoint


def resume(study: StudyConfig, typed: Collection[str]) -> Resumed:
    """Open the run that `output.resume` names: an id in `output.dir`, or a folder.

    The stored config counts. Rounds and deadlines may grow where they are typed anew, so that
    `-c 'output.resume="RUN"'` alone changes nothing.

    Args:
        study: The new config.
        typed: Keys that the user gave, e.g. `federation.rounds`; the others are an app's defaults.

    Raises:
        StudyError: There is no such run, or it can't be read.
    """
    root = Path(study.output.dir).expanduser().absolute()
    path = (root / Path(study.output.resume).expanduser()).resolve()
    try:
        stored = StudyConfig.from_json((path / "config.json").read_text(encoding="utf-8"))
        plan = Plan.from_json((path / "plan.json").read_text(encoding="utf-8"))
        folder = RunFolder(path)
    except OSError:
        raise StudyError(
            f"output.resume: no run in {path}; give the id of a run in output.dir, or its folder"
        ) from None
    except (ConfigError, ValueError) as error:
        raise StudyError(f"output.resume: {path} is of another version ({error})") from None
    checkpoint = load_checkpoint(path / "checkpoint")
    # Replies to a run that is gone never come.
    checkpoint.progress.late.clear()
    folder.write_history(checkpoint.progress.history)
    return Resumed(
        study=_merged(stored, study, typed), plan=plan, folder=folder, checkpoint=checkpoint
    )


def _merged(stored: StudyConfig, new: StudyConfig, typed: Collection[str]) -> StudyConfig:
    keys = [key for key in _MAY_GROW if f"federation.{key.replace('_', '-')}" in typed]
    larger = {key: max(getattr(part.federation, key) for part in (stored, new)) for key in keys}
    federation = stored.federation.model_copy(update=larger)
    return stored.model_copy(update={"federation": federation, "output": new.output})
