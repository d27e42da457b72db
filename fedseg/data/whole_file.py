"""Write a file that is there whole or not at all, or say in one line why it can't be."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedseg.errors import DataError

__all__ = ["replace_file", "writing"]


@contextmanager
def writing(path: Path, *, kind: str) -> Iterator[None]:
    """Make an error of the system one of a user's: `path` is a `kind`, file or folder, of theirs.

    Raises:
        DataError: It can't be written.
    """
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{path}: can't be written ({error.strerror}); free space, or give another {kind}"
        ) from None


def replace_file(path: Path, content: bytes, *, durable: bool = False) -> None:
    """Write the file beside its place, then give it its name in one step.

    Args:
        path: The file; what was there before stays until the new one is whole.
        content: What it holds.
        durable: Whether it must also outlive a power failure.

    Raises:
        OSError: It can't be written; what was there before still is.
    """
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
