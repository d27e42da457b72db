"""Write a file that is there whole or not at all."""

import os
from pathlib import Path

__all__ = ["replace_file"]


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
