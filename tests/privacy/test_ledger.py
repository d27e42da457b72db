"""Tests of the ledger: what is written stays, and whatever happens to it is noticed."""

import json
import logging
import multiprocessing
import os
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from fedseg.errors import LedgerError
from fedseg.privacy.ledger import MENDED, append, append_judged, read, verify


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    """A ledger of five lines."""
    path = tmp_path / "folder" / "ledger.jsonl"
    for number in range(5):
        append(path, {"kind": "train", "round": number, "note": 'quote " and\nnewline, ü'})
    return path


def test_lines_come_back_in_order(ledger: Path) -> None:
    entries = read(ledger)
    assert [entry["round"] for entry in entries] == [0, 1, 2, 3, 4]
    assert [entry["sequence"] for entry in entries] == [1, 2, 3, 4, 5]
    assert entries[0]["note"] == 'quote " and\nnewline, ü'
    assert [entry["previous"] for entry in entries[1:]] == [e["hash"] for e in entries[:-1]]
    assert len(ledger.read_bytes().splitlines()) == 5
    assert all(entry["time"].endswith("+00:00") for entry in entries)


def test_append_gives_the_line_as_it_is_read_back(ledger: Path) -> None:
    line = append(ledger, {"kind": "x", "pair": (1, 2.5)})
    assert read(ledger)[-1] == line
    assert verify(ledger).head == line["hash"]


def test_hash_is_that_of_the_line_without_it(ledger: Path) -> None:
    """An independent check: sha256sum of the line with the hash taken out."""
    for line in ledger.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        body = line.replace(f',"hash":"{entry["hash"]}"', "")
        found = subprocess.run(["sha256sum"], input=body.encode(), capture_output=True, check=True)
        assert found.stdout.split()[0].decode() == entry["hash"]


def test_no_file_has_no_lines_but_cannot_be_verified(tmp_path: Path) -> None:
    assert read(tmp_path / "none.jsonl") == []
    with pytest.raises(LedgerError, match=r"none\.jsonl"):
        verify(tmp_path / "none.jsonl")


def test_only_its_owner_reads_it(ledger: Path) -> None:
    assert stat.S_IMODE(ledger.stat().st_mode) == 0o600


def test_every_changed_byte_is_found(ledger: Path) -> None:
    whole = ledger.read_bytes()
    for place in range(len(whole)):
        ledger.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        if place == len(whole) - 1:  # without its newline the last line isn't whole
            assert verify(ledger).torn > 0
            continue
        line = whole[:place].count(b"\n") + 1
        with pytest.raises(LedgerError, match=f"line {line}:"):
            verify(ledger)


@pytest.mark.parametrize(
    ("order", "at"),
    [
        ([0, 2, 3, 4], 2),
        ([1, 2, 3, 4], 1),
        ([0, 2, 1, 3, 4], 2),
        ([0, 1, 1, 2, 3, 4], 3),
        ([4, 3, 2, 1, 0], 1),
    ],
)
def test_deleted_moved_and_repeated_lines_are_found(
    ledger: Path, order: Sequence[int], at: int
) -> None:
    lines = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(b"".join(lines[i] for i in order))
    with pytest.raises(LedgerError, match=f"line {at}: doesn't follow"):
        verify(ledger)
    with pytest.raises(LedgerError):
        read(ledger)


def test_line_with_a_hash_of_its_own_but_another_chain_is_found(
    ledger: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.jsonl"
    for number in range(3):
        append(other, {"round": number})
    lines = ledger.read_bytes().splitlines(keepends=True)
    foreign = other.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(b"".join([*lines[:2], foreign[2], *lines[3:]]))
    with pytest.raises(LedgerError, match="line 3: doesn't follow"):
        verify(ledger)


def test_cut_tail_holds_together_so_only_its_head_tells(ledger: Path) -> None:
    before = verify(ledger)
    lines = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(b"".join(lines[:3]))
    after = verify(ledger)
    assert len(after.entries) == 3
    assert before.head not in {entry["hash"] for entry in after.entries}


def test_torn_line_is_mended_and_told_of_wherever_it_is_cut(
    ledger: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = ledger.read_bytes()
    start = len(whole.rpartition(b"\n")[0].rpartition(b"\n")[0]) + 1
    for end in range(start + 1, len(whole)):
        ledger.write_bytes(whole[:end])
        assert verify(ledger).torn == end - start
        assert len(read(ledger)) == 4
        caplog.clear()
        with caplog.at_level(logging.WARNING, "fedseg"):
            append(ledger, {"kind": "next"})
        entries = read(ledger)
        assert [entry.get("kind") for entry in entries[4:]] == [MENDED, "next"]
        assert entries[4]["bytes"] == end - start
        assert "torn" in caplog.text
        assert verify(ledger).torn == 0


def test_damaged_last_line_stops_appends(ledger: Path) -> None:
    whole = ledger.read_bytes()
    ledger.write_bytes(whole[:-20] + bytes([whole[-20] ^ 1]) + whole[-19:])
    with pytest.raises(LedgerError, match="last line: was changed"):
        append(ledger, {"kind": "next"})
    assert ledger.stat().st_size == len(whole)


@pytest.mark.parametrize(
    "content",
    [b"\n", b"[]\n", b"{}\n", b"\0" * 100 + b"\n", b'{"hash":"x"}\n', b"[" * 10**5 + b"\n"],
)
def test_other_files_are_no_ledger(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(content)
    with pytest.raises(LedgerError):
        verify(path)
    with pytest.raises(LedgerError):
        append(path, {})


def test_line_of_zeros_as_power_failures_leave_them_is_mended(ledger: Path) -> None:
    with ledger.open("ab") as file:
        file.write(b"\0" * 4096)
    append(ledger, {"kind": "next"})
    assert [entry.get("kind") for entry in read(ledger)[5:]] == [MENDED, "next"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, b"bytes"])
def test_what_is_no_json_is_refused(ledger: Path, value: object) -> None:
    size = ledger.stat().st_size
    with pytest.raises(LedgerError, match="expected plain JSON"):
        append(ledger, {"value": value})
    assert ledger.stat().st_size == size


@pytest.mark.parametrize("key", ["sequence", "time", "previous", "hash"])
def test_entry_cannot_set_what_the_ledger_sets(ledger: Path, key: str) -> None:
    with pytest.raises(LedgerError, match=key):
        append(ledger, {key: 1})


def test_long_lines(ledger: Path) -> None:
    text = "x" * 300_000
    append(ledger, {"text": text})
    append(ledger, {"kind": "next"})
    assert read(ledger)[5]["text"] == text
    with pytest.raises(LedgerError, match="at most"):
        append(ledger, {"text": "x" * (17 * 1024 * 1024)})
    assert len(read(ledger)) == 7


def _append_many(path: Path, name: str) -> None:
    for number in range(40):
        append(path, {"by": name, "number": number})


def test_processes_at_once(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_append_many, args=(path, name)) for name in "abc"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    entries = read(path)
    assert len(entries) == 120
    for name in "abc":
        assert [e["number"] for e in entries if e["by"] == name] == list(range(40))


def _spend(path: Path) -> None:
    def judge(entries: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        spent = sum(entry["spent"] for entry in entries)
        if spent >= 10:
            raise LedgerError("all spent")
        return {"spent": 1}

    for _ in range(10):
        try:
            append_judged(path, judge)
        except LedgerError:
            return


def test_nobody_comes_between_judging_and_appending(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_spend, args=(path,)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert len(read(path)) == 10


def test_what_a_judge_refuses_is_not_written(ledger: Path) -> None:
    def judge(entries: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        raise KeyError(len(entries))

    with pytest.raises(KeyError, match="5"):
        append_judged(ledger, judge)
    assert len(read(ledger)) == 5
    append(ledger, {"kind": "next"})  # the lock is free again


_KILLED = """
import sys
from pathlib import Path
from fedseg.privacy.ledger import append
for number in range(10**6):
    append(Path(sys.argv[1]), {"number": number, "text": "x" * 20_000})
    print(number, flush=True)
"""


def test_killed_process_leaves_all_that_append_returned_for(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with subprocess.Popen(
        [sys.executable, "-c", _KILLED, str(path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        said = [int(process.stdout.readline()) for _ in range(30)]
        process.send_signal(signal.SIGKILL)
        said += [int(line) for line in process.stdout]
    append(path, {"number": "after"})
    numbers = [entry["number"] for entry in read(path) if "number" in entry]
    assert numbers[: len(said)] == said
    assert numbers[-1] == "after"


_FULL = """
import resource, signal, sys
from pathlib import Path
from fedseg.errors import LedgerError
from fedseg.privacy.ledger import append, read
path = Path(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 100, resource.RLIM_INFINITY))
try:
    append(path, {"text": "x" * 1000})
except LedgerError as error:
    assert "can't append" in str(error), error
    assert len(read(path)) == 5
    print("refused")
"""


def test_full_disk_leaves_the_ledger_whole(ledger: Path) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    size = ledger.stat().st_size
    found = subprocess.run(
        [sys.executable, "-c", _FULL, str(ledger)], capture_output=True, text=True, check=False
    )
    assert found.stdout == "refused\n", found.stderr
    assert ledger.stat().st_size == size


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "ledger.jsonl", tmp_path):
        with pytest.raises(LedgerError, match="can't append"):
            append(path, {})
    assert os.listdir(tmp_path) == ["file"]
