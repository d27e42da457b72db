"""Tests of the audit: a run's record against the ledgers, and every way to tamper with either."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spoilt import spoilt

from fedseg.errors import DataError, LedgerError
from fedseg.federation.audit import audit_run
from fedseg.privacy.ledger import append, read, verify

Run = Callable[..., Any]
NAMES = ("aachen", "bonn", "chemnitz")
OWN = ("sequence", "time", "previous", "hash")
"""What the ledger itself adds to a line."""


@dataclass
class Study:
    """A study that was run, with a ledger at each site.

    Attributes:
        folder: The run folder.
        ledgers: Each site's ledger.
        grid: What went to and fro.
    """

    folder: Path
    ledgers: list[Path]
    grid: Any

    def errors(self) -> list[str]:
        return [
            str(p) for p in audit_run(self.folder, self.ledgers).problems if p.severity[0] == "e"
        ]


@pytest.fixture
def study(run_study: Run, make_site: Callable[..., Path], tmp_path: Path) -> Callable[..., Study]:
    """Run a study of three sites."""

    def make(config: dict[str, Any] | None = None, **hooks: Any) -> Study:
        sites = {
            n: {
                "data-dir": str(make_site(name, seed=n)),
                "device": "cpu",
                "ledger": str(tmp_path / name / "ledger.jsonl"),
            }
            for n, name in enumerate(NAMES, start=1)
        }
        folder, grid = run_study(sites, {"federation.sites": 3, **(config or {})}, **hooks)
        return Study(folder.path, [Path(str(s["ledger"])) for s in sites.values()], grid)

    return make


SECURE = {"privacy.secure-aggregation": True, "federation.guard": False}


_kept: dict[bool, Path] = {}
"""One plain and one secure run for all that is done to their files afterwards."""


@pytest.fixture
def finished(
    study: Callable[..., Study], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Study]:
    """A copy of the files that a study of two rounds left."""

    def copy(*, secure: bool = False) -> Study:
        if secure not in _kept:
            made = study(SECURE if secure else {})
            kept = _kept[secure] = tmp_path_factory.mktemp("finished")
            shutil.copytree(made.folder, kept / made.folder.name)
            for name, path in zip(NAMES, made.ledgers, strict=True):
                shutil.copy(path, kept / f"{name}.jsonl")
        shutil.copytree(_kept[secure], tmp_path / "copy")
        (folder,) = (tmp_path / "copy").glob("2*")
        return Study(folder, [tmp_path / "copy" / f"{name}.jsonl" for name in NAMES], None)

    return copy


def edit_history(folder: Path, number: int, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "history.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    change(lines[number])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def rewritten(path: Path, change: Callable[[dict[str, Any]], object], *, at: int) -> None:
    """Write a ledger anew with one line changed, as someone who has the file and the code can."""
    entries = read(path)
    change(entries[at])
    path.unlink()
    for entry in entries:
        append(path, {key: value for key, value in entry.items() if key not in OWN})


def trained(path: Path, number: int = 1) -> int:
    """Place of a round's training in a ledger."""
    return next(
        i
        for i, entry in enumerate(read(path))
        if entry["message"] == "train" and entry["round"] == number
    )


class TestLedgerOfARun:
    def test_one_line_for_everything_that_left(self, study: Callable[..., Study]) -> None:
        made = study()
        for node, path in enumerate(made.ledgers, start=1):
            left = [m for m in made.grid.received if m.metadata.src_node_id == node]
            assert left
            told = [
                (m.metadata.message_type.removeprefix("query."), m.content["ledger"]["hash"])
                for m in left
            ]
            lines = read(path)
            assert [(line["message"], line["hash"]) for line in lines] == told
            assert {line["site"] for line in lines} == {NAMES[node - 1]}
            assert {line["status"] for line in lines} == {"ok"}

    def test_line_tells_names_shapes_bytes_and_digest(self, study: Callable[..., Study]) -> None:
        made = study()
        train = next(m for m in made.grid.received if m.metadata.message_type == "train")
        (line,) = (
            e
            for path in made.ledgers
            for e in read(path)
            if e["hash"] == train.content["ledger"]["hash"]
        )
        update = train.content["update"]
        rows = [[n, a.dtype, list(a.shape), len(a.data)] for n, a in update.items()]
        assert line["records"]["update"]["arrays"] == rows
        assert line["bytes"] == sum(len(a.data) for a in update.values())
        assert line["records"]["metrics"]["values"] == dict(train.content["metrics"])
        norm = sum(float((a.numpy().astype(float) ** 2).sum()) for a in update.values()) ** 0.5
        assert line["norm"] == pytest.approx(norm)
        assert line["peers"]["sites"] == 3
        digest = hashlib.sha256(json.dumps(sorted(NAMES)).encode()).hexdigest()
        assert line["peers"]["sha256"] == digest
        assert line["run"] == made.folder.name
        assert line["round"] == 1

    def test_fingerprint_has_the_digest_of_what_fedseg_fingerprint_prints(
        self, study: Callable[..., Study]
    ) -> None:
        made = study()
        sent = next(m for m in made.grid.received if "fingerprint" in m.content)
        text = sent.content["fingerprint"]["json"].encode()
        found = [e for path in made.ledgers for e in read(path) if e["message"] == "fingerprint"]
        digests = {e["records"]["fingerprint"]["values"]["json"]["sha256"] for e in found}
        assert hashlib.sha256(text).hexdigest() in digests

    def test_nothing_in_it_names_a_file_or_case(self, finished: Callable[..., Study]) -> None:
        for path in finished().ledgers:
            text = path.read_text()
            assert "/" not in text
            assert "case-" not in text


class TestHonestRuns:
    @pytest.mark.parametrize("config", [{}, {"federation.compression": "int8"}])
    def test_plain(self, study: Callable[..., Study], config: dict[str, Any]) -> None:
        made = study(config)
        found = audit_run(made.folder, made.ledgers)
        assert found.clean
        assert not found.problems
        lines = sum(len(read(path)) for path in made.ledgers)
        assert sum(found.matched.values()) == lines
        assert found.scores == [1, 2]
        assert set(found.matched) == set(NAMES)

    def test_secure_aggregation_shows_the_sum(self, finished: Callable[..., Study]) -> None:
        made = finished(secure=True)
        found = audit_run(made.folder, made.ledgers)
        assert not found.problems
        assert found.sums == [1, 2]

    def test_some_ledgers_show_some_sites(self, finished: Callable[..., Study]) -> None:
        made = finished(secure=True)
        found = audit_run(made.folder, made.ledgers[:1])
        assert found.clean
        assert set(found.matched) == {"aachen"}
        assert found.sums == []
        notes = [str(problem) for problem in found.problems]
        assert [n for n in notes if "bonn: none of the ledgers is its" in n]
        assert [n for n in notes if "round 2: the sum isn't shown" in n]

    def test_scores_over_all_sites_take_all_ledgers(self, finished: Callable[..., Study]) -> None:
        made = finished()
        found = audit_run(made.folder, made.ledgers[:2])
        assert found.clean
        assert found.scores == []
        notes = [str(problem) for problem in found.problems]
        assert [n for n in notes if "scores: those over all sites in rounds 1, 2 aren't shown" in n]

    def test_late_update_is_a_note(self, study: Callable[..., Study]) -> None:
        def silent(message: Any) -> Any:
            return None if message.metadata.message_type == "train" else message

        made = study({"federation.round-deadline": 0.5}, reply={3: silent})
        found = audit_run(made.folder, made.ledgers)
        assert found.clean
        assert any("left, and the server doesn't say" in str(p) for p in found.problems)

    def test_refusal_is_in_both(self, study: Callable[..., Study], tmp_path: Path) -> None:
        def strict(message: Any) -> Any:
            (tmp_path / "aachen" / "site.toml").write_text("policy.min-cases = 99\n")
            return message

        made = study(reply={1: strict})
        assert audit_run(made.folder, made.ledgers).clean
        line = read(made.ledgers[0])[trained(made.ledgers[0])]
        assert (line["status"], line["reason"]) == ("refused", "policy-min-cases")
        assert set(line["records"]) == {"status", "metrics"}


class TestTampering:
    @pytest.mark.parametrize("secure", [False, True], ids=["plain", "secure"])
    def test_ledger_written_anew_with_one_line_changed(
        self, finished: Callable[..., Study], secure: bool
    ) -> None:
        made = finished(secure=secure)
        path = made.ledgers[1]
        rewritten(path, lambda entry: entry.update(norm=0.001), at=trained(path, 2))
        assert verify(path).entries  # the chain itself is whole again
        assert any("isn't in the ledger" in e or "no hash of any" in e for e in made.errors())

    def test_cut_tail(self, finished: Callable[..., Study]) -> None:
        made = finished()
        path = made.ledgers[2]
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[:-2]))
        assert len(verify(path).entries) == len(lines) - 2
        assert [e for e in made.errors() if "chemnitz" in e and "cut off with the tail" in e]

    def test_broken_chain(self, finished: Callable[..., Study]) -> None:
        made = finished()
        path = made.ledgers[0]
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[:2] + lines[3:]))
        assert [e for e in made.errors() if "line 3: doesn't follow" in e]

    def test_ledger_of_another_run(self, finished: Callable[..., Study], tmp_path: Path) -> None:
        made = finished()
        other = tmp_path / "other.jsonl"
        shutil.copy(made.ledgers[0], other)
        rewritten(other, lambda entry: None, at=0)
        made.ledgers[0] = other
        assert [e for e in made.errors() if "not a ledger of run" in e]

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            (lambda s: s["received"]["train"].update(sha256="0" * 64), "the server has SHA-256"),
            (lambda s: s["received"]["train"].update(ledger="0" * 64), "isn't in the ledger"),
            (lambda s: s["received"].pop("train"), "isn't in the ledger"),
            (lambda s: s["training"].update(cases=99), "other numbers of training"),
            (lambda s: s.update(bytes_up=1), "the server got 1 bytes"),
            (
                lambda s: s["received"].update(train=s["received"]["evaluate"]),
                "the ledger says it was",
            ),
        ],
        ids=["digest", "line", "receipt", "numbers", "bytes", "kind"],
    )
    def test_server_that_says_something_else(
        self, finished: Callable[..., Study], change: Callable[[dict[str, Any]], object], told: str
    ) -> None:
        made = finished()
        edit_history(made.folder, 2, lambda line: change(line["sites"]["bonn"]))
        (error, *_) = made.errors()
        assert "bonn, round 2" in error
        assert told in error

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            (
                lambda line: line["federated"].update({"liver.dice": 0.99}),
                "error: scores, round 2: the scores over all sites aren't those of the ledgers: "
                "liver.dice",
            ),
            (lambda line: line["federated"].pop("tumor.recall"), "tumor.recall"),
            (
                lambda line: line["sites"]["bonn"]["metrics"].update({"liver.dice": 0.99}),
                "bonn, round 2: evaluate: the server has other scores",
            ),
            (
                lambda line: line["sites"]["bonn"].update(no_metrics="deadline", metrics={}),
                "bonn, round 2: evaluate: the server has other scores",
            ),
        ],
        ids=["better", "one less", "a site's", "a site left out"],
    )
    def test_server_with_other_scores(
        self, finished: Callable[..., Study], change: Callable[[dict[str, Any]], object], told: str
    ) -> None:
        made = finished()
        edit_history(made.folder, 2, change)
        (error, *_) = made.errors()
        assert told in error
        assert audit_run(made.folder, made.ledgers).scores == [1]

    def test_server_with_other_scores_of_a_sum(self, finished: Callable[..., Study]) -> None:
        made = finished(secure=True)
        edit_history(made.folder, 2, lambda line: line["federated"].update({"liver.dice": 0.99}))
        (error,) = made.errors()
        assert "round 2: the server's sum of scores isn't that of the ledgers: liver.dice" in error

    def test_server_that_moves_an_update_to_another_round(
        self, finished: Callable[..., Study]
    ) -> None:
        made = finished()

        def swap(line: dict[str, Any]) -> None:
            line["round"] = 1

        edit_history(made.folder, 2, swap)
        assert [e for e in made.errors() if "the ledger says it was" in e]

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            (lambda secure: secure.update(checksum=secure["checksum"] ^ 1), "checksum"),
            (lambda secure: secure["sums"].update(cases=7.0), "cases"),
        ],
    )
    def test_server_with_another_sum(
        self, finished: Callable[..., Study], change: Callable[[dict[str, Any]], object], told: str
    ) -> None:
        made = finished(secure=True)
        edit_history(made.folder, 1, lambda line: change(line["secagg"]))
        (error,) = made.errors()
        assert error.startswith("error: sum, round 1: the server's sum isn't that of the ledgers")
        assert told in error

    def test_server_with_another_sum_of_scores(self, finished: Callable[..., Study]) -> None:
        made = finished(secure=True)
        edit_history(made.folder, 2, lambda line: line["scored"].update(checksum=1))
        (error,) = made.errors()
        assert error == (
            "error: sum, round 2: the server's sum of scores isn't that of the ledgers: "
            "checksum of the words"
        )

    def test_reply_changed_on_the_way(self, study: Callable[..., Study]) -> None:
        def change(message: Any) -> Any:
            if message.metadata.message_type == "train":
                message.content["metrics"]["loss"] = 0.0
            return message

        made = study(reply={2: change})
        assert [e for e in made.errors() if "bonn, round 1: train: the server has SHA-256" in e]


class TestFuzzing:
    """Record and ledgers come from others: whatever they say, the audit tells it in one line."""

    @pytest.mark.parametrize("secure", [False, True], ids=["plain", "secure"])
    def test_spoilt_records(self, finished: Callable[..., Study], secure: bool) -> None:
        made = finished(secure=secure)
        manifest = json.loads((made.folder / "manifest.json").read_text())
        history = [json.loads(x) for x in (made.folder / "history.jsonl").read_text().splitlines()]

        @given(data=st.data())
        @settings(max_examples=150, deadline=None)
        def spoil(data: st.DataObject) -> None:
            record = {"manifest": manifest, "lines": history}
            name = data.draw(st.sampled_from(["manifest", "lines"]))
            record[name] = data.draw(spoilt(record[name]))
            lines = record["lines"] if isinstance(record["lines"], list) else [record["lines"]]
            (made.folder / "manifest.json").write_text(json.dumps(record["manifest"]))
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (made.folder / "history.jsonl").write_text(text)
            with contextlib.suppress(DataError):
                audit_run(made.folder, made.ledgers).to_json()

        spoil()

    @pytest.mark.parametrize("secure", [False, True], ids=["plain", "secure"])
    def test_spoilt_ledgers(self, finished: Callable[..., Study], secure: bool) -> None:
        """Written anew, so that the chain holds, and known to the server by their hashes."""
        made = finished(secure=secure)
        entries = read(made.ledgers[0])
        record = {
            path: path.read_text()
            for path in (made.folder / "manifest.json", made.folder / "history.jsonl")
        }

        @given(data=st.data())
        @settings(max_examples=60, deadline=None)
        def spoil(data: st.DataObject) -> None:
            at = data.draw(st.integers(0, len(entries) - 1))
            made.ledgers[0].unlink(missing_ok=True)
            hashes = {}
            for place, entry in enumerate(entries):
                own = {key: value for key, value in entry.items() if key not in OWN}
                changed = data.draw(spoilt(own)) if place == at else own
                if not isinstance(changed, dict) or set(changed) & set(OWN):
                    changed = {"kind": "left"}
                with contextlib.suppress(LedgerError):  # what is no plain JSON isn't written
                    hashes[entry["hash"]] = append(made.ledgers[0], changed)["hash"]
            for path, text in record.items():
                for old, new in hashes.items():
                    text = text.replace(old, new)
                path.write_text(text)
            with contextlib.suppress(DataError):
                audit_run(made.folder, made.ledgers).to_json()

        spoil()

    @given(st.binary(max_size=300))
    @settings(max_examples=200, deadline=None)
    def test_bytes_that_are_no_ledger(
        self, tmp_path_factory: pytest.TempPathFactory, data: bytes
    ) -> None:
        path = tmp_path_factory.mktemp("any") / "ledger.jsonl"
        path.write_bytes(data)
        with contextlib.suppress(LedgerError):
            assert verify(path).entries == []

    def test_deep_and_long_records_are_one_line(self, tmp_path: Path) -> None:
        for text in ("[" * 100_000, '{"a":' * 100_000):
            (tmp_path / "manifest.json").write_text(text)
            (tmp_path / "history.jsonl").write_text("")
            with pytest.raises(DataError, match="damaged"):
                audit_run(tmp_path, [])
        with (tmp_path / "manifest.json").open("wb") as file:
            file.truncate(2**31)
        with pytest.raises(DataError, match="more than"):
            audit_run(tmp_path, [])


def test_other_folders_are_no_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a run's folder"):
        audit_run(tmp_path, [])
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "history.jsonl").write_text("")
    with pytest.raises(DataError, match="older fedseg"):
        audit_run(tmp_path, [])
    (tmp_path / "history.jsonl").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        audit_run(tmp_path, [])
