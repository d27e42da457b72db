"""`fedseg check` on 100 phantom cases, as a site engineer runs it.

    python benchmarks/check.py
    python benchmarks/check.py --cases 20 --no-result    # a quick look

Writes the cases into a temporary folder, 20 of each kind, then times the command from its start to
its end, start of Python included, and keeps its largest memory. Writes
`benchmarks/results/<date>-check.md`.
"""

import argparse
import datetime
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import processor, write_result

from fedseg.data.phantom import KINDS, write_phantom_site

TARGET_SECONDS = 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--no-result", action="store_true", help="print only")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        site = Path(scratch) / "site"
        kinds = list(KINDS.values())
        for number in range(options.cases):
            write_phantom_site(site, kinds[number % len(kinds)], [number], name="site")
        command = [Path(sys.executable).parent / "fedseg", "check", site, "--json"]
        began = time.monotonic()
        done = subprocess.run(command, capture_output=True, check=False)
        seconds = time.monotonic() - began
    report = json.loads(done.stdout)
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    warned = report["counts"]["error"] + report["counts"]["warning"]
    text = (
        f"# `fedseg check`, {datetime.date.today()}\n\n{processor()}; one process; "
        f"{report['cases']} phantom cases of {len(kinds)} kinds, none of them spoilt\n\n"
        "| seconds | target | most memory | usable | false alarms | notes |\n"
        "|---|---|---|---|---|---|\n"
        f"| {seconds:.1f} | {TARGET_SECONDS} | {memory:.0f} MB | {report['usable']} | {warned} | "
        f"{report['counts']['note']} |\n"
    )
    print(text) if options.no_result else write_result("check", text)


if __name__ == "__main__":
    main()
