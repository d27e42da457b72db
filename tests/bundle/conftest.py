"""One bundle of a small model for all tests here."""

from pathlib import Path

import pytest
from small_model import plan_of, write_model

from fedseg.bundle.export import export_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    model = write_model(folder / "m.safetensors", plan_of(), run="2026-01-01", round="4")
    return export_bundle(model, folder / "liver", license="CC BY 4.0", authors="the sites")
