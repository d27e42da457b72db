"""Shared fixtures: one thread, own folders, tiny sites, and Flower in one process."""

import itertools
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

import nibabel as nib
import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from local_grid import SMALL, LocalGrid

from fedseg import cli, server_app, site_work
from fedseg.federation.run_folder import RunFolder


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_log_handlers() -> Iterator[None]:
    """The apps add a handler for this test's captured stderr; it must not outlive the test."""
    yield
    logger = logging.getLogger("fedseg")
    logger.handlers.clear()
    logger.propagate = True


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Caches and runs of a test stay in a folder of its own."""
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("FEDSEG_HOME", str(folder))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return folder


@pytest.fixture
def fedseg(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Call `fedseg` and return exit code, output and errors."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedseg", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        output = capsys.readouterr()
        return int(caught.value.code or 0), output.out, output.err

    return call


def write_case(folder: Path, name: str, seed: int, *, shape: tuple[int, int, int]) -> None:
    """Write a cheap CT-like case: a body, a bright liver box, a dark tumour in it."""
    rng = np.random.default_rng(seed)
    image = np.full(shape, -1000.0)
    image[1:-1, 1:-1, 1:-1] = 0
    labels = np.zeros(shape, np.uint8)
    low = [n // 4 + int(rng.integers(2)) for n in shape]
    high = [3 * n // 4 for n in shape]
    labels[low[0] : high[0], low[1] : high[1], low[2] : high[2]] = 1
    labels[low[0] + 2 : low[0] + 5, low[1] + 2 : low[1] + 5, low[2] + 2 : low[2] + 5] = 2
    image[labels == 1], image[labels == 2] = 120, 60
    image += rng.normal(0, 10, shape)
    affine = np.diag([3.0, 3.0, 3.0, 1.0])
    for part, array in (("images", image.astype(np.int16)), ("masks", labels)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(array, affine), folder / part / f"{name}.nii.gz")


@pytest.fixture
def make_site(tmp_path: Path) -> Callable[..., Path]:
    """Write a site's folder: `make_site("aachen", cases=3)`."""

    def make(
        name: str, *, cases: int = 3, seed: int = 0, shape: tuple[int, int, int] = (20, 18, 16)
    ) -> Path:
        folder = tmp_path / name
        for case in range(cases):
            write_case(folder, f"case-{case}", 100 * seed + case, shape=shape)
        (folder / "site.toml").write_text(f'name = "{folder.name}"\n')
        return folder

    return make


@pytest.fixture
def run_study(tmp_path: Path) -> Iterator[Callable[..., tuple[RunFolder, LocalGrid]]]:
    """Run a whole study in this process."""
    identity = (TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id)
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    runs = itertools.count()

    def run(
        node_configs: dict[int, dict[str, Any]], config: dict[str, Any] | None = None, **hooks: Any
    ) -> tuple[RunFolder, LocalGrid]:
        output = {"output.dir": str(tmp_path / "runs" / str(next(runs)))}
        run_config = {**SMALL, **output, **(config or {})}
        site_work._built.cache_clear()
        grid = LocalGrid(node_configs, run_config, typed=config, **hooks)
        run.grid = grid  # type: ignore[attr-defined]
        context = Context(7, 1, {}, RecordDict(), run_config)
        return server_app.run_study(grid, context), grid

    yield run
    TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = identity
