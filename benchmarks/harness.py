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


def run(options: str, scratch: Path, *, sites: int = 3) -> tuple[float, list[dict]]:
    """Run the study; return seconds from `flwr run` to its end, and the history."""
    ports = (str(free_port()), str(free_port()))
    env = {
        **os.environ,
        "FLWR_HOME": str(scratch / "flwr"),
        "FEDSEG_HOME": str(scratch / "fedseg"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": ports[0],
        "FLWR_LOCAL_CONTROL_API_PORT": ports[1],
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    command = ["flwr", "run", str(ROOT), "--stream"]
    command += ["--federation-config", f"num-supernodes={sites}"]
    command += ["-c", f'output.dir="{scratch / "runs"}" {options}']
    began = time.monotonic()
    try:
        subprocess.run(command, env=env, cwd=scratch, check=True)
        seconds = time.monotonic() - began
        manifest = json.loads((scratch / "runs" / "latest" / "manifest.json").read_text())
        assert manifest["status"] == "completed", manifest
    finally:
        stop_superlink(ports[0])
    lines = (scratch / "runs" / "latest" / "history.jsonl").read_text().splitlines()
    return seconds, [json.loads(line) for line in lines]


def stop_superlink(port: str) -> None:
    """Stop the local SuperLink that `flwr run` left running on our own port."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_text().split("\0")
        except OSError:
            continue
        if "--port" in words and port in words and any("superlink" in word for word in words):
            os.kill(int(entry.name), signal.SIGTERM)


def processor() -> str:
    """Name of the processor and number of cores."""
    text = Path("/proc/cpuinfo").read_text()
    found = re.search(r"model name\s*: (.*)", text)
    flags = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in text]
    cores = len(os.sched_getaffinity(0))
    return f"{found.group(1) if found else platform.machine()}, {cores} cores, {', '.join(flags)}"


def write_result(name: str, text: str) -> None:
    """Print a result and keep it with its date."""
    print(text)
    file = f"{datetime.date.today()}-{name}.md"
    (ROOT / "benchmarks" / "results" / file).write_text(text)
