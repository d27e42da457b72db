"""A small untrained model in a file."""

from pathlib import Path
from typing import Any

from fedseg.config import StudyConfig
from fedseg.data.plan import Plan
from fedseg.data.planning import make_plan
from fedseg.segmentation.model_file import save_model
from fedseg.segmentation.models import build_model


def plan_of(name: str = "unet", **changes: Any) -> Plan:
    study = StudyConfig.from_run_config({"train.spacing": "4,4,5", "train.patch-size": "32,32,32"})
    depth = 5 if name == "unet++" else 3
    return make_plan(study).model_copy(
        update={"model": name, "width": 4, "depth": depth, **changes}
    )


def write_model(path: Path, plan: Plan, **notes: str) -> Path:
    save_model(path, build_model(plan, seed=3).state_dict(), plan, **notes)
    return path
