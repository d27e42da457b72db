"""The run folder: what a study run leaves, as files a person can open."""

import hashlib
import importlib.metadata
import json
import os
import platform
import secrets
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import fedseg
from fedseg.config import StudyConfig
from fedseg.data.plan import Plan
from fedseg.data.whole_file import replace_file
from fedseg.errors import StudyError

__all__ = ["RunFolder", "new_run_id"]

_PACKAGES = ("flwr", "torch", "monai", "nibabel", "numpy")


def new_run_id() -> str:
    """Make the id of a study run; it starts with the date (UTC)."""
    now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H-%M-%S")  # noqa: UP017
    return f"{now}-{secrets.token_hex(2)}"


class RunFolder:
    """`<output.dir>/<run-id>/` with its files.

    Attributes:
        path: Absolute path of the folder.
        run_id: Id of the study run.
    """

    def __init__(self, path: Path) -> None:
        """Take a folder that is there; the manifest goes on from what it has."""
        self.path, self.run_id = path, path.name
        manifest = path / "manifest.json"
        self._manifest: dict[str, Any] = (
            json.loads(manifest.read_text()) if manifest.exists() else {}
        )

    @classmethod
    def create(cls, study: StudyConfig, plan: Plan, run_id: str) -> "RunFolder":
        """Create the folder, `config.json`, `plan.json` and the link `latest`.

        Raises:
            StudyError: It can't be written.
        """
        root = Path(study.output.dir).expanduser().absolute()
        try:
            (root / run_id).mkdir(parents=True)
            folder = cls(root / run_id)
            folder.write_json("config.json", study.model_dump(mode="json", by_alias=True))
            (folder.path / "plan.json").write_text(plan.to_json() + "\n", encoding="utf-8")
            folder._link_latest(root)
        except OSError as error:
            raise StudyError(
                f"output.dir: can't write {root / run_id} ({error.strerror}); free space or set "
                "another"
            ) from None
        return folder

    def _link_latest(self, root: Path) -> None:
        link = root / f".latest-{self.run_id}"
        link.symlink_to(self.run_id)
        os.replace(link, root / "latest")

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file atomically."""
        self._write(name, json.dumps(content, indent=2) + "\n")

    def write_history(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Make `history.jsonl` hold just these lines, atomically."""
        self._write(
            "history.jsonl", "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        )

    def _write(self, name: str, text: str) -> None:
        replace_file(self.path / name, text.encode())

    def append_history(self, line: Mapping[str, Any]) -> None:
        """Add one round to `history.jsonl`; on disk when this returns."""
        with (self.path / "history.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def add_flower_run(self, run_id: int) -> None:
        """Note a Flower run: a resumed study run has more than one."""
        self.update_manifest(flwr_runs=[*self._manifest.get("flwr_runs", []), run_id])

    def add_received(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Note what came from sites outside the rounds, for `fedseg audit`."""
        self.update_manifest(received=[*self._manifest.get("received", []), *entries])

    def update_manifest(self, **entries: Any) -> None:
        """Set entries of `manifest.json`."""
        if not self._manifest:
            self._manifest = {
                "run": self.run_id,
                "fedseg": fedseg.__version__,
                "python": platform.python_version(),
                "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
                "git_commit": _git_commit(),
                "code_sha256": _code_digest(),
            }
        self._manifest.update(entries)
        self.write_json("manifest.json", self._manifest)


def _code_digest() -> str:
    """SHA-256 over the package's own files: also tells versions apart outside a checkout."""
    root = Path(fedseg.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _git_commit() -> str | None:
    """Commit of the code, where it runs from a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None
