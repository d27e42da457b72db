"""What a site has sent masked it never sends again, whoever asks at once."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from protocol import terms

from fedseg.errors import Reason, SiteError
from fedseg.privacy.sent_once import check_unsent, note_sending, note_step


def sends(cache: Path, name: str = "aachen", **changed: object) -> bool:
    try:
        note_sending(cache, name, terms(**changed))  # type: ignore[arg-type]
    except SiteError as error:
        assert error.reason is Reason.SENT_ALREADY
        return False
    return True


def test_each_run_round_and_purpose_is_sent_once(tmp_path: Path) -> None:
    asked = [
        {},
        {"number": 2},
        {"purpose": "evaluate"},
        {"purpose": "final"},
        {"run": "run-2"},
        {"name": "bonn"},
    ]
    check_unsent(tmp_path, "aachen", terms())
    for changed in asked:
        assert sends(tmp_path, **changed)
    for changed in asked:
        assert not sends(tmp_path, **changed)
    with pytest.raises(SiteError, match="once"):
        check_unsent(tmp_path, "aachen", terms())
    # Other terms make no other round of it: a sum over more sites of the same updates.
    assert not sends(tmp_path, share=0.9, clip=7.0)


def test_of_many_at_once_one_may_send(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        may = list(pool.map(lambda _: sends(tmp_path), range(64)))
    assert sum(may) == 1


def test_each_step_with_one_key_is_answered_once(tmp_path: Path) -> None:
    for step, key in (("shares", b"a" * 32), ("done", b"a" * 32), ("done", b"b" * 32)):
        note_step(tmp_path, "aachen", terms(), step, key)
        with pytest.raises(SiteError, match="once"):
            note_step(tmp_path, "aachen", terms(), step, key)
    check_unsent(tmp_path, "aachen", terms())  # a round that was only begun is begun anew


def test_what_cannot_be_written_down_is_not_sent(tmp_path: Path) -> None:
    (tmp_path / "sent").write_text("in the way")
    with pytest.raises(OSError):
        note_sending(tmp_path, "aachen", terms())
