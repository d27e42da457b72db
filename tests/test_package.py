"""The package itself: what an install without torch says, and what the seeds must keep giving."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fedseg
from fedseg.config import StudyConfig
from fedseg.data.cache import cached_case
from fedseg.data.patches import batches
from fedseg.data.phantom import KINDS, write_phantom_site
from fedseg.data.planning import make_plan
from fedseg.data.sites import find_cases
from fedseg.segmentation.losses import dice_ce
from fedseg.segmentation.models import build_model
from fedseg.segmentation.training import fit


def test_without_torch_the_import_says_what_to_do() -> None:
    root = Path(fedseg.__file__).parents[1]
    # -I -S: no site-packages, so neither torch nor flwr is there.
    code = f"import sys; sys.path.insert(0, {str(root)!r}); import fedseg"
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: fedseg needs torch and flwr: run `pip install")
    assert "uv pip install --no-config -e ." in last


def test_golden_loss_of_a_seeded_phantom_round(tmp_path: Path) -> None:
    """A refactor keeps these numbers; raise them only with a change that is meant to."""
    write_phantom_site(tmp_path, KINDS["portal"], [1, 2], name="golden")
    study = StudyConfig.from_run_config(
        {
            "model.width": 4,
            "model.depth": 3,
            "train.patch-size": "32,32,32",
            "train.spacing": "5,5,5",
            "train.precision": "fp32",
        }
    )
    plan = make_plan(study)
    cases = [cached_case(case, plan, tmp_path / "cache") for case in find_cases(tmp_path).cases]
    network = build_model(plan, seed=0)
    losses: list[float] = []
    fit(
        network,
        batches(
            cases,
            steps=6,
            batch_size=2,
            patch_size=plan.patch_size,
            foreground=0.67,
            augmentation="light",
            rng=np.random.default_rng(0),
        ),
        dice_ce,
        study.train,
        steps=6,
        round_number=1,
        rounds=1,
        on_step=lambda step, steps, loss: losses.append(float(loss)),
    )
    assert losses == pytest.approx(GOLDEN, rel=2e-3)
    assert all(bool(torch.isfinite(p).all()) for p in network.parameters())


GOLDEN = [2.31118, 2.18444, 2.11647, 2.07298, 2.12896, 2.08955]
