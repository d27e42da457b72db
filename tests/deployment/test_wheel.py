"""What `pip install fedseg` brings to a hospital, and what a source archive brings to a study."""

import importlib.metadata
import json
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from processes import CHECKOUT, SMALL, Workplace, process_table

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Packages:
    """The built archives, a virtual environment with the wheel, and the unpacked source."""

    wheel: Path
    sdist: Path
    bin: Path
    source: Path


def write_console_scripts(package: str, python: Path) -> None:
    """Give an environment the programs of a package that lies elsewhere on its path."""
    for entry in importlib.metadata.distribution(package).entry_points:
        if entry.group == "console_scripts":
            script = python.parent / entry.name
            lines = (
                f"#!{python}",
                "import sys",
                f"from {entry.module} import {entry.attr}",
                f"sys.exit({entry.attr}())",
            )
            script.write_text("\n".join(lines) + "\n")
            script.chmod(0o755)


@pytest.fixture(scope="module")
def packages(workplace: Workplace) -> Packages:
    """Build from the checkout, the wheel out of the source archive as `build` does."""
    dist = workplace.root / "dist"
    build = (sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, CHECKOUT)
    workplace.call(*build)
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(workplace.root, filter="data")

    venv = workplace.root / "venv"
    workplace.call(sys.executable, "-m", "venv", venv)
    python = venv / "bin" / "python"
    install = (python, "-m", "pip", "install", "--no-index", "--no-deps", "--force-reinstall")
    workplace.call(*install, "--disable-pip-version-check", wheel)
    # Dependencies come from this interpreter: they are gigabytes. A plain line doesn't read the
    # .pth files there, so the checkout, where it is installed as editable, isn't on the path.
    ask = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    site = Path(workplace.call(python, "-c", ask).strip())
    (site / "dependencies.pth").write_text(
        f"{importlib.metadata.distribution('flwr').locate_file('')}\n"
    )
    write_console_scripts("flwr", python)
    return Packages(wheel, sdist, venv / "bin", workplace.root / sdist.name.removesuffix(".tar.gz"))


def files(*folders: str) -> set[str]:
    """Files of the checkout, without compiled ones."""
    return {
        str(path.relative_to(CHECKOUT))
        for folder in folders
        for path in (CHECKOUT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_wheel_is_fedseg_with_its_weights_and_nothing_else(packages: Packages) -> None:
    with zipfile.ZipFile(packages.wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        lines = archive.read(metadata).decode().splitlines()
    code = {name for name in names if ".dist-info/" not in name}
    assert code == files("fedseg", "fedseg_weights")
    assert "fedseg_weights/demo.safetensors" in code
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert "Name: fedseg" in lines
    assert any(line.startswith("Requires-Dist: torch>=") for line in lines)


def test_sdist_has_code_tests_and_license(packages: Packages) -> None:
    found = {
        str(path.relative_to(packages.source))
        for path in packages.source.rglob("*")
        if path.is_file()
    }
    wanted = {"pyproject.toml", "LICENSE", "README.md", *files("fedseg", "fedseg_weights", "tests")}
    wanted |= {f"docs/{page.name}" for page in (CHECKOUT / "docs").glob("*.md")}
    assert wanted <= found
    assert not [name for name in found if name.endswith((".nii.gz", ".pyc"))]
    weights = [name for name in found if name.endswith(".safetensors")]
    assert weights == ["fedseg_weights/demo.safetensors"]


def test_command_line_of_the_wheel(
    workplace: Workplace, packages: Packages, phantoms: Path
) -> None:
    where = workplace.call(packages.bin / "python", "-c", "import fedseg; print(fedseg.__file__)")
    assert Path(where.strip()).is_relative_to(packages.bin.parent)
    report = workplace.call(packages.bin / "fedseg", "check", phantoms / "site-0", "--json")
    assert json.loads(report)["usable"] == 4
    bundle = workplace.root / "demo-bundle"
    workplace.call(packages.bin / "fedseg", "export", "demo", "-o", bundle)
    assert (bundle / "models" / "model.ts").is_file()
    version = workplace.call(packages.bin / "fedseg", "--version")
    assert version.strip() == f"fedseg {importlib.metadata.version('fedseg')}"


def test_supernode_of_the_wheel_trains_in_a_study_of_the_sdist(
    workplace: Workplace, packages: Packages, phantoms: Path
) -> None:
    workplace.superlink()
    workplace.connection("insecure = true")
    env = workplace.env("site-0")
    node = workplace.supernode(
        "site-0",
        {"data-dir": str(phantoms / "site-0"), "device": "cpu", "threads": 1},
        env={**env, "PATH": f"{packages.bin}:{env['PATH']}"},
        program=packages.bin / "flower-supernode",
    )
    workplace.wait_online(1)
    children = [row.args for row in process_table() if row.parent == node.popen.pid]
    assert [args for args in children if str(packages.bin) in args], children
    config = {**SMALL, "federation.rounds": 1, "federation.min-sites": 1}
    run = workplace.deploy(config, app=packages.source)
    assert run.status == "finished:completed"
    site = run.history()[1]["sites"]["site-0"]
    assert site["status"] == "ok"
    assert site["metrics"]["liver.dice"] is not None
