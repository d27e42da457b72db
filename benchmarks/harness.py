"""What the benchmarks share: run a study by `flwr run` in a place of its own, name the hardware."""

import datetime
import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def own_place(folder: Path, ports: tuple[str, str]) -> dict[str, str]:
    """Environment in which `flwr run` leaves everything in a folder and listens on own ports."""
    return {
        **os.environ,
        "FLWR_HOME": str(folder / "flwr"),
        "FEDSEG_HOME": str(folder / "fedseg"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": ports[0],
        "FLWR_LOCAL_CONTROL_API_PORT": ports[1],
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }


def run(options: str, scratch: Path, *, sites: int = 3) -> tuple[float, list[dict]]:
    """Run the study; return seconds from `flwr run` to its end, and the history."""
    ports = (str(free_port()), str(free_port()))
    command = ["flwr", "run", str(ROOT), "--stream"]
    command += ["--federation-config", f"num-supernodes={sites}"]
    command += ["-c", f'output.dir="{scratch / "runs"}" {options}']
    began = time.monotonic()
    try:
        subprocess.run(command, env=own_place(scratch, ports), cwd=scratch, check=True)
        seconds = time.monotonic() - began
        manifest = json.loads((scratch / "runs" / "latest" / "manifest.json").read_text())
        assert manifest["status"] == "completed", manifest
    finally:
        stop_superlink(ports[0])
    lines = (scratch / "runs" / "latest" / "history.jsonl").read_text().splitlines()
    return seconds, [json.loads(line) for line in lines]


def stop_superlink(port: str) -> None:
    """Stop the local SuperLink that `flwr run` left on our own port, and a simulation it runs."""
    ours = {port, f"127.0.0.1:{port}"}
    programs = {"flower-superlink", "flwr-simulation"}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_text().split("\0")[:-1]
        except OSError:
            continue
        if ours & set(words) and programs & {Path(word).name for word in words}:
            os.kill(int(entry.name), signal.SIGTERM)


def processor() -> str:
    """Name of the processor and number of cores."""
    text = Path("/proc/cpuinfo").read_text()
    found = re.search(r"model name\s*: (.*)", text)
    flags = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in text]
    cores = len(os.sched_getaffinity(0))
    return ", ".join([found.group(1) if found else platform.machine(), f"{cores} cores", *flags])


RESULTS = ROOT / "benchmarks" / "results"


def write_result(name: str, text: str) -> None:
    """Print a result and keep it with its date."""
    print(text)
    (RESULTS / f"{datetime.date.today()}-{name}.md").write_text(text)
    (RESULTS / f"{name}.part").unlink(missing_ok=True)


def write_part(name: str, text: str) -> None:
    """Keep what there is of a result, in case the rest is broken off."""
    (RESULTS / f"{name}.part").write_text(text)


def rival_venv(folder: Path, requirements: list[str]) -> Path:
    """Python of a venv for a rival, made once; torch is the one this process has."""
    import torch

    python = folder / "bin" / "python"
    ready = folder / "ready"
    if not ready.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pinned = f"torch=={torch.__version__.partition('+')[0]}"
        subprocess.run([python, "-m", "pip", "install", "-q", pinned], check=True)
        constraints = folder / "constraints.txt"
        constraints.write_text(pinned + "\n")
        command = [python, "-m", "pip", "install", "-q", "-c", constraints, *requirements]
        subprocess.run(command, check=True)
        ready.touch()
    return python


def synthetic_scan(shape: tuple[int, int, int], seed: int):
    """HU int16 and labels uint8: a body with a liver and a tumour, noise as CT has it."""
    import numpy as np

    rng = np.random.default_rng(seed)
    x, y, z = (np.linspace(-1, 1, n, dtype=np.float32) for n in shape)
    x, y, z = x[:, None, None], y[None, :, None], z[None, None, :]
    labels = ((x + 0.3) ** 2 + y**2 + z**2 < 0.2).astype(np.uint8)
    labels[(x + 0.35) ** 2 + (y - 0.1) ** 2 + z**2 < 0.015] = 2
    body = x**2 + (y / 0.8) ** 2 < 0.9
    image = np.where(body, np.float32(50), np.float32(-1000)) + np.array([0, 60, 10])[labels]
    image = image + 20 * rng.standard_normal(shape, dtype=np.float32)
    return image.astype(np.int16), labels


def cached_scan(folder: Path, shape: tuple[int, int, int], seed: int):
    """A case as FedSeg's cache holds it, made directly: memory-mapped arrays of any size."""
    import numpy as np

    from fedseg.data.cache import CachedCase
    from fedseg.data.preprocess import Placement

    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "truth.npy").exists():
        hu, labels = synthetic_scan(shape, seed)
        np.save(folder / "image.npy", np.clip((hu - 50) / 70, -2, 2).astype(np.float16))
        for name, lowest in (("liver", 1), ("tumor", 2)):
            indices = np.flatnonzero(labels >= lowest)
            chosen = np.random.default_rng(0).choice(indices, min(indices.size, 20_000), False)
            np.save(folder / f"{name}.npy", np.sort(chosen))
        np.save(folder / "labels.npy", labels)
        np.save(folder / "truth.npy", labels)
    found = {
        name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        for name in ("image", "labels", "truth", "liver", "tumor")
    }
    x, y, z = shape
    whole = (slice(0, x), slice(0, y), slice(0, z))
    return CachedCase(
        image=found["image"],
        labels=found["labels"],
        truth=found["truth"],
        foreground={name: found[name] for name in ("liver", "tumor")},
        placement=Placement(shape=shape, spacing=(1.0, 1.0, 1.0), grid=shape, box=whole),
    )


def watched(command: list) -> tuple[float, float]:
    """Run a command; return its seconds and its peak resident memory, GB, seen from outside."""
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, peak_memory(process.pid))
        time.sleep(0.02)
    if process.wait():
        raise subprocess.CalledProcessError(process.returncode, command)
    return time.monotonic() - began, peak / 1e6


def peak_memory(pid: int) -> int:
    """Peak resident memory of a process so far, kB; 0 where it has ended."""
    # Its own peak: ru_maxrss would count this process as it was when it forked.
    try:
        found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(found.group(1)) if found else 0
