"""One workplace a module; a test that fails shows the logs of its processes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import Workplace

_MOST_LOGS = 12

_open: list[Workplace] = []


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    place = Workplace(tmp_path_factory.mktemp("workplace"))
    _open.append(place)
    try:
        yield place
    finally:
        try:
            place.stop()
        finally:
            _open.remove(place)


@pytest.fixture(scope="module")
def phantoms(workplace: Workplace) -> Path:
    """Three sites of four phantoms."""
    out = workplace.root / "phantoms"
    workplace.call("fedseg", "phantom", out, "--sites", "3", "--cases", "4")
    return out


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Iterator[None]:
    report = (yield).get_result()
    if report.failed:
        for place in _open:
            logs = [(name, text) for name, text in place.logs() if text]
            report.sections += [(f"log of {name}", text) for name, text in logs[-_MOST_LOGS:]]
