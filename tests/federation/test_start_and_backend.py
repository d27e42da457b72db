"""A study that starts from weights that exist, and one that trains by Lightning."""

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from local_grid import sent_weights
from read_run import weights

from fedseg.errors import ConfigError, ModelError
from fedseg.segmentation.model_file import BEST

Run = Callable[..., Any]
ONE_ROUND = {"federation.rounds": 1}

needs_lightning = pytest.mark.skipif(
    importlib.util.find_spec("lightning") is None, reason="lightning isn't installed"
)


@pytest.fixture
def sites(make_site: Callable[..., Path]) -> dict[int, dict[str, Any]]:
    return {n: {"data-dir": str(make_site(f"site-{n}", seed=n))} for n in (1, 2, 3)}


def first_sent(grid: Any, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    message = next(m for m in grid.sent if m.metadata.message_type == "train")
    return sent_weights(message, like)


def test_run_starts_from_the_best_model_of_another(run_study: Run, sites: Any) -> None:
    first, _ = run_study(sites, ONE_ROUND)
    for source in (str(first.path), first.run_id):
        # An id is looked up in output.dir.
        config = {**ONE_ROUND, "model.init-from": source, "output.dir": str(first.path.parent)}
        _, grid = run_study(sites, config)
        sent = first_sent(grid, weights(first))
        assert all(torch.equal(sent[name], t) for name, t in weights(first, BEST).items())


def test_consent_lets_a_part_start_anew_and_the_log_says_which(
    run_study: Run, sites: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, _ = run_study(sites, ONE_ROUND)
    state = weights(first)
    gone = next(iter(state))
    torch.save({n: t for n, t in state.items() if n != gone}, tmp_path / "part.pt")
    config = {**ONE_ROUND, "model.init-from": str(tmp_path / "part.pt")}
    with pytest.raises(ModelError, match="1 are missing"):
        run_study(sites, config)
    assert not [m for m in run_study.grid.sent if m.metadata.message_type == "train"]
    _, grid = run_study(sites, {**config, "model.init-partial": True})
    assert f"starts anew: {gone} " in capsys.readouterr().err
    sent = first_sent(grid, state)
    assert all(torch.equal(sent[name], state[name]) == (name != gone) for name in state)


def test_unreadable_start_is_said_before_any_site_is_asked(run_study: Run, sites: Any) -> None:
    with pytest.raises(ModelError, match=r"model\.init-from: got 'nowhere'"):
        run_study(sites, {"model.init-from": "nowhere"})
    assert run_study.grid.sent == []


def test_resume_needs_the_start_no_more(run_study: Run, sites: Any, tmp_path: Path) -> None:
    first, _ = run_study(sites, ONE_ROUND)
    source = tmp_path / "start.safetensors"
    source.write_bytes((first.path / "model-last.safetensors").read_bytes())
    begun, _ = run_study(sites, {**ONE_ROUND, "model.init-from": str(source)})
    source.unlink()
    config = {"federation.rounds": 2, "output.resume": str(begun.path)}
    going_on, _ = run_study(sites, config)
    assert going_on.path == begun.path
    assert len((begun.path / "history.jsonl").read_text().splitlines()) == 3


@needs_lightning
def test_lightning_gives_the_weights_of_the_torch_loop(run_study: Run, sites: Any) -> None:
    config = {"federation.rounds": 2, "train.optimizer-state": "keep"}
    found = [
        weights(run_study(sites, {**config, "train.backend": backend})[0])
        for backend in ("torch", "lightning")
    ]
    ours, theirs = found
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-5


@contextlib.contextmanager
def _without_lightning(message: object) -> Iterator[None]:
    """A site where Lightning isn't installed."""
    gone = {name: m for name, m in sys.modules.items() if name.split(".")[0] == "lightning"}
    for name in gone:
        del sys.modules[name]
    sys.modules["lightning"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["lightning"]
        sys.modules.update(gone)


@needs_lightning
def test_site_without_lightning_is_left_out_with_its_reason(run_study: Run, sites: Any) -> None:
    config = {**ONE_ROUND, "train.backend": "lightning"}
    folder, _ = run_study(sites, config, around={2: _without_lightning})
    history = (folder.path / "history.jsonl").read_text()
    assert '"model-missing"' in history and history.count('"status": "ok"') >= 2


def test_backend_that_is_not_there_ends_the_run_before_it_starts(
    run_study: Run, sites: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "lightning" else real(name, *rest),
    )
    with pytest.raises(ConfigError, match=r"pip install 'fedseg\[lightning\]'"):
        run_study(sites, {"train.backend": "lightning"})
    assert run_study.grid.sent == []
