"""A site's memory of what it has sent: each round's words leave it once, and each step's answer.

A server that gets the sum of one round twice, over different sites, has the difference: what one of
them sent, for training and scoring from the same model are repeatable. So a site writes down what
it is about to send, on disk, as Flower's state of a node is gone after a resume; and what is
written down it doesn't send again. Each entry is an empty file: making it is one atomic step, so of
two runs at the same time one is refused.
"""

import os
from pathlib import Path

from fedseg.errors import Reason, SiteError
from fedseg.privacy.roster import Terms

__all__ = ["check_unsent", "note_sending", "note_step"]


def _entry(cache: Path, name: str, terms: Terms, step: str = "") -> Path:
    return cache / "sent" / terms.run / (name or "site") / f"{terms.round}-{terms.purpose}{step}"


def check_unsent(cache: Path, name: str, terms: Terms) -> None:
    """Check before anything is computed that the site hasn't sent these words already.

    Args:
        cache: The site's cache folder.
        name: The site's own name.
        terms: Study run, round and purpose.

    Raises:
        SiteError: It has.
    """
    if _entry(cache, name, terms).exists():
        raise SiteError(Reason.SENT_ALREADY)


def note_sending(cache: Path, name: str, terms: Terms) -> None:
    """Write down, durably, that the words leave now.

    Raises:
        SiteError: They have left already.
        OSError: It can't be written; then nothing may leave.
    """
    _note(_entry(cache, name, terms))


def note_step(cache: Path, name: str, terms: Terms, step: str, key: bytes) -> None:
    """Write down, durably, that the answer to a step leaves now.

    Args:
        cache: The site's cache folder.
        name: The site's own name.
        terms: Study run, round and purpose.
        step: The step.
        key: The site's own public key: a round that is begun anew has another.

    Raises:
        SiteError: One has left already.
        OSError: It can't be written; then nothing may leave.
    """
    _note(_entry(cache, name, terms, f"-{step}-{key.hex()[:32]}"))


def _note(entry: Path) -> None:
    entry.parent.mkdir(parents=True, exist_ok=True)
    try:
        entry.touch(exist_ok=False)
    except FileExistsError:
        raise SiteError(Reason.SENT_ALREADY) from None
    folder = os.open(entry.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
