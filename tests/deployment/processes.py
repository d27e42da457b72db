"""Start, watch and stop real `flwr`, SuperLink and SuperNode processes, all in a folder of a test.

Everything runs on 127.0.0.1, on ports that were free a moment ago, and with its own FLWR_HOME and
FEDSEG_HOME, so a test neither sees nor stops what somebody else runs on this machine.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
FEDERATION = "hospital-net"

SMALL = {
    "model.width": 4,
    "model.depth": 3,
    "train.patch-size": "16,16,16",
    "train.spacing": "6,6,6",
    "train.steps-per-epoch": 2,
    "data.phantom-cases": 2,
    "data.server-cases": 1,
    "federation.rounds": 2,
}
"""A study that trains in a moment."""

_TAIL = 40
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until(condition: Callable[[], Any], what: str, *, seconds: float = 60) -> Any:
    """Poll until the condition holds, and return what it returned."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"after {seconds:g} s still not: {what}")
        time.sleep(0.1)
    return found


@dataclass(frozen=True)
class Row:
    """One line of the process table."""

    pid: int
    parent: int
    group: int
    args: str


def process_table() -> list[Row]:
    """All processes of the machine that are no zombies."""
    command = ["ps", "-A", "-ww", "-o", "pid=,ppid=,pgid=,stat=,args="]
    listing = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = []
    for line in listing.stdout.splitlines():
        parts = line.split(None, 4)
        if len(parts) == 5 and not parts[3].startswith("Z"):
            rows.append(Row(int(parts[0]), int(parts[1]), int(parts[2]), parts[4]))
    return rows


def tree(pid: int) -> list[Row]:
    """A process, its descendants, and whoever is in the process group of one of them."""
    table = process_table()
    found = {row.pid: row for row in table if row.pid == pid}
    while True:
        groups = {row.group for row in found.values()} - {os.getpgrp()}
        new = [
            row
            for row in table
            if row.pid not in found and (row.parent in found or row.group in groups)
        ]
        if not new:
            return list(found.values())
        found.update({row.pid: row for row in new})


def _still_there(rows: list[Row]) -> list[Row]:
    # By group, not by name: Ray's workers rename themselves.
    now = {(row.pid, row.group) for row in process_table()}
    return [row for row in rows if (row.pid, row.group) in now]


def stop_tree(
    pid: int,
    *,
    gently: bool = True,
    reap: Callable[[], object] = lambda: None,
    seconds: float = 20,
) -> None:
    """End a process and what it started; by force where they don't go.

    Args:
        pid: The process.
        gently: Ask with SIGTERM first.
        reap: Takes note of its end, where it is our child: a SuperExec goes when its parent has
            gone, and as long as nobody asks after it, it hasn't.
        seconds: How long to wait before force.
    """
    rows = tree(pid)
    if gently and any(row.pid == pid for row in rows):
        os.kill(pid, signal.SIGTERM)
        end = time.monotonic() + seconds
        while _still_there(rows) and time.monotonic() < end:
            reap()
            time.sleep(0.1)
    for row in _still_there(rows):
        try:
            os.kill(row.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


@dataclass
class Process:
    """A process that runs beside the test, with its output in a file."""

    name: str
    popen: subprocess.Popen[bytes]
    log: Path

    def text(self) -> str:
        """What it printed so far, without colours."""
        return _ESCAPES.sub("", self.log.read_text(encoding="utf-8", errors="replace"))

    def kill(self) -> None:
        """Pull the plug: SIGKILL for the process and what it started."""
        stop_tree(self.popen.pid, gently=False)
        self.popen.wait(30)


@dataclass(frozen=True)
class Run:
    """A run that has ended.

    Attributes:
        id: Flower's run id.
        status: Its status, `finished:completed` or another.
        output: What `flwr run --stream` printed.
        folder: The run folder, None if there is none.
    """

    id: int
    status: str
    output: str
    folder: Path | None

    def history(self) -> list[dict[str, Any]]:
        """Lines of `history.jsonl`."""
        assert self.folder is not None, self.output
        lines = (self.folder / "history.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def manifest(self) -> dict[str, Any]:
        """Content of `manifest.json`."""
        assert self.folder is not None, self.output
        content: dict[str, Any] = json.loads((self.folder / "manifest.json").read_text())
        return content


@dataclass
class Workplace:
    """A folder of a test, the processes that run in it, and how to start and stop them.

    Attributes:
        root: The folder.
        bin: Folder of `flwr` and the other programs.
        processes: What was started.
    """

    root: Path
    bin: Path = BIN
    processes: list[Process] = field(default_factory=list)
    address: str = ""
    _runs: int = 0

    def __post_init__(self) -> None:
        for name in ("flwr", "logs", "empty", "runs", "tmp"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        self._ports = [free_port(), free_port()]

    def env(self, home: str = "", **more: str) -> dict[str, str]:
        """Environment of a process, with its own homes under `home`."""
        kept = {
            key: value
            for key, value in os.environ.items()
            # OMP_: tests set it, module-wide fixtures begin before; the last bits depend on it.
            if not key.startswith(("FLWR_", "FEDSEG_", "PYTHON", "COV_", "VIRTUAL_ENV", "OMP_"))
        }
        return {
            **kept,
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(self.root / home / "flwr"),
            "FEDSEG_HOME": str(self.root / home / "fedseg"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(self._ports[0]),
            "FLWR_LOCAL_CONTROL_API_PORT": str(self._ports[1]),
            "UV_OFFLINE": "1",
            "UV_CACHE_DIR": str(self.root / "uv-cache"),
            "RAY_DEDUP_LOGS": "0",
            "COLUMNS": "200",
            **more,
        }

    def start(
        self,
        name: str,
        *command: str | Path,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Process:
        """Start a process in a session of its own; its folder isn't the checkout."""
        log = self.root / "logs" / f"{name}.log"
        with log.open("wb") as output:
            popen = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=cwd or self.root / "empty",
                env=dict(env or self.env()),
                start_new_session=True,
            )
        process = Process(name, popen, log)
        self.processes.append(process)
        return process

    def finish(self, process: Process, *, seconds: float = 480) -> int:
        """Wait for a process to end and return its exit status."""
        wait_until(
            lambda: process.popen.poll() is not None, f"{process.name} ended", seconds=seconds
        )
        status: int = process.popen.returncode
        return status

    def call(
        self,
        *command: str | Path,
        expect: int = 0,
        seconds: float = 120,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> str:
        """Run a command to its end and return what it printed."""
        self._runs += 1
        process = self.start(
            f"{self._runs:02d}-{Path(command[0]).name}", *command, cwd=cwd, env=env
        )
        status = self.finish(process, seconds=seconds)
        assert status == expect, f"{process.name}: exit status {status}\n{process.text()}"
        return process.text()

    # SuperLink and SuperNodes

    def superlink(
        self,
        *options: str | Path,
        port: int | None = None,
        database: bool = True,
        env: Mapping[str, str] | None = None,
    ) -> Process:
        """Start a SuperLink and wait until it listens; without options it has no TLS."""
        port = port or free_port()
        self.address = f"127.0.0.1:{port}"
        superlink = self.start(
            "superlink",
            "flower-superlink",
            *(options or ("--insecure",)),
            *("--host", "127.0.0.1", "--port", str(port)),
            "--disable-runtime-dependency-installation",
            *(("--database", self.root / "state.db") if database else ()),
            env=self.env("server", **(env or {})),
        )

        def listens() -> bool:
            assert superlink.popen.poll() is None, f"SuperLink ended\n{superlink.text()}"
            with socket.socket() as probe:
                probe.settimeout(1)
                return probe.connect_ex(("127.0.0.1", port)) == 0

        wait_until(listens, "SuperLink listens")
        return superlink

    def connection(self, *lines: str) -> None:
        """Write the connection to the SuperLink where `flwr run` reads it."""
        lines = (f"[superlink.{FEDERATION}]", f'address = "{self.address}"', *lines)
        config = self.root / "flwr" / "config.toml"
        config.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def supernode(
        self,
        name: str,
        node_config: Mapping[str, object],
        *options: str | Path,
        env: Mapping[str, str] | None = None,
        program: Path | None = None,
    ) -> Process:
        """Start a SuperNode; without options it has no TLS."""
        entries = [f"{key}={json.dumps(value)}" for key, value in node_config.items()]
        return self.start(
            name,
            program or "flower-supernode",
            *(options or ("--insecure",)),
            *("--superlink", self.address, "--port", str(free_port())),
            *(("--node-config", " ".join(entries)) if entries else ()),
            env=env or self.env(name),
        )

    def wait_online(self, count: int) -> None:
        """Wait until so many SuperNodes are online."""

        def online() -> bool:
            for process in self.processes:
                if "flower-supernode" in str(process.popen.args):
                    assert process.popen.poll() is None, f"{process.name}\n{process.text()}"
            answer = self.call("flwr", "supernode", "list", FEDERATION, "--format", "json")
            nodes = _json(answer)["nodes"]
            return sum(node["status"] == "online" for node in nodes) >= count

        wait_until(online, f"{count} SuperNodes are online")

    # Runs

    def begin(
        self,
        config: Mapping[str, object],
        *options: str,
        app: Path | str = CHECKOUT,
        where: str = "",
    ) -> Process:
        """Begin `flwr run --stream` of a folder or an app of a hub; return while it runs."""
        self._runs += 1
        config = {"output.dir": str(self.root / "runs" / str(self._runs)), **config}
        overrides = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
        return self.start(
            f"{self._runs:02d}-flwr-run",
            *("flwr", "run", "." if isinstance(app, Path) else app),
            *([where] if where else []),
            *("--stream", *options, "-c", overrides),
            cwd=app if isinstance(app, Path) else None,
        )

    def end(self, process: Process, *, where: str = "", seconds: float = 480) -> Run:
        """Wait for the end of a run that was begun."""
        self.finish(process, seconds=seconds)
        output = process.text()
        found = re.search(r"Successfully started run (\d+)", output)
        assert found, f"no run was started\n{output}"

        def status() -> str:
            listing = ["flwr", "ls", *([where] if where else []), "--run-id", found[1]]
            text: str = _json(self.call(*listing, "--format", "json"))["runs"][0]["status"]
            return text if text.startswith("finished") else ""

        ended = wait_until(status, f"run {found[1]} has finished")
        number = process.name.split("-")[0]
        latest = self.root / "runs" / str(int(number)) / "latest"
        folder = latest.resolve() if latest.is_symlink() else None
        return Run(int(found[1]), ended, output, folder)

    def simulate(self, config: Mapping[str, object], *, sites: int, seconds: float = 480) -> Run:
        """Simulate a study in the checkout."""
        federation = f"num-supernodes={sites} client-resources-num-cpus=1"
        begun = self.begin(config, "--federation-config", federation)
        return self.end(begun, seconds=seconds)

    def deploy(
        self, config: Mapping[str, object], *, app: Path | str = CHECKOUT, seconds: float = 480
    ) -> Run:
        """Run a study on the SuperLink and the SuperNodes of this workplace."""
        begun = self.begin(config, app=app, where=FEDERATION)
        return self.end(begun, where=FEDERATION, seconds=seconds)

    # The end

    def local_superlink(self) -> int | None:
        """Pid of the SuperLink that a simulated `flwr run` of this workplace started.

        Flower keeps no pid file. Its log file lies in our FLWR_HOME, which nobody else's does.
        """
        log = str(self.root / "flwr" / "local-superlink" / "superlink.log")
        for row in process_table():
            if "flower-superlink" in row.args and log in row.args:
                return row.pid
        return None

    def stop(self) -> None:
        """Stop all that was started, newest first."""
        for process in reversed(self.processes):
            if process.popen.poll() is None:
                stop_tree(process.popen.pid, reap=process.popen.poll)
            process.popen.wait(30)
        local = self.local_superlink()
        if local is not None:
            stop_tree(local)
        elif (self.root / "flwr" / "local-superlink" / "superlink.log").exists():
            raise AssertionError("the local SuperLink that `flwr run` started wasn't found")

    def logs(self) -> Iterator[tuple[str, str]]:
        """Name and last lines of each process's log."""
        for process in self.processes:
            yield process.name, "\n".join(process.text().splitlines()[-_TAIL:])
        for path in self.root.glob("flwr/local-superlink/*.log"):
            text = path.read_text(encoding="utf-8", errors="replace")
            yield "local SuperLink", "\n".join(text.splitlines()[-_TAIL:])


def _json(text: str) -> dict[str, Any]:
    """The JSON object in what a `flwr` command printed; it may print other lines around it."""
    decoder = json.JSONDecoder()
    for found in re.finditer(r"^\{", text, re.MULTILINE):
        try:
            content: dict[str, Any] = decoder.raw_decode(text[found.start() :])[0]
        except json.JSONDecodeError:
            continue
        return content
    raise AssertionError(f"no JSON in: {text}")
