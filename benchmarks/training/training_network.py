"""The network and plan that all parts of the training benchmark share."""

import torch

from fedseg.config import StudyConfig
from fedseg.data.plan import Plan
from fedseg.data.planning import make_plan
from fedseg.segmentation.models import build_model


def build(*, channels_last: bool = True) -> tuple[torch.nn.Module, Plan]:
    """The default U-Net, width 16 and five levels (4.8M parameters), patches of 64^3."""
    study = StudyConfig.from_run_config(
        {"model.width": 16, "model.depth": 5, "train.patch-size": "64,64,64"}
    )
    plan = make_plan(study)
    network = build_model(plan, seed=0)
    if channels_last:
        network = network.to(memory_format=torch.channels_last_3d)
    return network, plan
