"""Memory of a real SuperLink, with and without `--database`, and of the ServerApp behind it.

    python benchmarks/superlink_memory.py            # 2 and 64 sites, 10 million parameters
    python benchmarks/superlink_memory.py --quick    # 2 and 3 sites, a small network: does it run?

`flwr run` starts two rounds on a SuperLink of this machine. The sites are threads of one process
that speak Flower's Fleet API as SuperNodes do: they pull the model and push a random update at
once, so as many are in the SuperLink at a time as can be. Peak resident memory of each process, and
the database's size on disk, seen from outside. Writes
`benchmarks/results/<date>-superlink-memory.md`.
"""

import argparse
import datetime
import functools
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Message
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import (
    pull_and_inflate_object_from_tree,
    push_object_contents_from_iterable,
)
from flwr.supernode.fleet_http_connection import http_request_response
from harness import ROOT, peak_memory, processor, write_result
from server_memory import SITES, answer, model_length, parameters, study_config

from fedseg.federation.compression import make_scheme
from fedseg.greeting import Greeting

sys.path.insert(0, str(ROOT / "tests" / "deployment"))

from processes import Workplace, tree

SERVER_APP = "flwr-serverapp"
POLL_SECONDS = 3  # as a SuperNode does


@dataclass(frozen=True)
class Outcome:
    """Peak resident memory of the processes and size of the database, MB; seconds of the run."""

    superlink: float
    server_app: float
    database: float
    seconds: float


def serve(address: str, sites: int) -> None:
    """Be so many sites until somebody stops this process."""
    threads = [threading.Thread(target=site, args=(address, n)) for n in range(sites)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def site(address: str, number: int) -> None:
    """Answer what comes, as a SuperNode and its ClientApp would together."""
    with http_request_response(address, insecure=True) as connection:
        _, receive, send, _, _, pull, push, confirm = connection
        while True:
            found = receive()
            if found is None:
                time.sleep(POLL_SECONDS)
                continue
            header, objects = found
            run = header.metadata.run_id
            message = pull_and_inflate_object_from_tree(
                objects,
                functools.partial(pull, run),
                functools.partial(confirm, run),
                return_type=Message,
            )
            message.metadata.__dict__["_message_id"] = header.metadata.message_id
            reply(message, number, send, push)


def reply(message: Message, number: int, send: Any, push: Any) -> None:
    """Answer a message."""
    kind = message.metadata.message_type
    length = model_length(message) if kind == "train" else 0
    said = answer(message, Greeting(name=f"site-{number}"), number, length, make_scheme("none"))
    with no_object_id_recompute():
        said.metadata.__dict__["_message_id"] = said.object_id
        wanted, session = send(said, get_object_tree(said), 0.1)
        nested = get_all_nested_objects(said)
        contents = ((name, nested[name].deflate()) for name in nested if name in wanted)
        push_object_contents_from_iterable(
            contents, functools.partial(push, message.metadata.run_id, session)
        )


def measure(sites: int, width: int, *, database: bool) -> Outcome:
    """Run a study and watch."""
    with tempfile.TemporaryDirectory() as folder:
        place = Workplace(Path(folder))
        try:
            superlink = place.superlink(database=database)
            place.connection("insecure = true")
            place.start("sites", sys.executable, __file__, "--serve", place.address, str(sites))
            place.wait_online(sites)
            began = time.monotonic()
            begun = place.begin(study_config(sites, "fedavg", width, "none"), where="hospital-net")
            peaks = {"flower-superlink": 0.0, SERVER_APP: 0.0}
            while begun.popen.poll() is None:
                for name, peak in watch(superlink.popen.pid):
                    peaks[name] = max(peaks[name], peak)
                time.sleep(0.2)
            seconds = time.monotonic() - began
            found = place.end(begun, where="hospital-net")
            assert found.status == "finished:completed", found.output
            assert [line.get("failed") for line in found.history()] == [None] * 3
            return Outcome(
                superlink=peaks["flower-superlink"],
                server_app=peaks[SERVER_APP],
                database=sum(path.stat().st_size for path in place.root.glob("state.db*")) / 1e6,
                seconds=seconds,
            )
        finally:
            place.stop()


def watch(superlink: int) -> Iterator[tuple[str, float]]:
    """Peak resident memory so far, MB, of the SuperLink and of its ServerApp."""
    for row in tree(superlink):
        name = "flower-superlink" if row.pid == superlink else SERVER_APP
        if row.pid != superlink and SERVER_APP not in row.args:
            continue
        yield name, peak_memory(row.pid) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve[0], int(options.serve[1]))
        return
    few, many = (2, 3) if options.quick else SITES
    width = 4 if options.quick else 23
    rows = [
        f"# Memory of SuperLink and ServerApp, {datetime.date.today()}",
        "",
        f"{processor()}; network of {parameters(width) / 1e6:.1f} million parameters, fedavg, two "
        "rounds, once each; peak resident memory of the process, MB",
        "",
        "| SuperLink | sites | SuperLink, MB | ServerApp, MB | database on disk at the end, MB | "
        "`flwr run`, s |",
        "|---|---|---|---|---|---|",
    ]
    for database in (False, True):
        for sites in (few, many):
            found = measure(sites, width, database=database)
            rows.append(
                f"| {'with' if database else 'without'} `--database` | {sites} | "
                f"{found.superlink:.0f} | {found.server_app:.0f} | {found.database:.0f} | "
                f"{found.seconds:.0f} |"
            )
            print(rows[-1], flush=True)
    if not options.quick:
        write_result("superlink-memory", "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
