"""Whole studies in one process: server and sites exchange real messages."""

import contextlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, Context, Message, RecordDict
from local_grid import sent_weights
from read_run import history, weights

from fedseg import cli, client_app, server_app, site_work
from fedseg.data.fingerprint import EDGES, Fingerprint
from fedseg.errors import ConfigError, ModelError, Reason, StudyError
from fedseg.federation import site_round
from fedseg.messages import PERSONAL, TRAIN_METRICS
from fedseg.segmentation.metrics import empty_sums

Run = Callable[..., Any]

EVALUATION_KEYS = {*empty_sums(), *(PERSONAL + key for key in (*empty_sums(), "kept"))}


@pytest.fixture
def three_sites(make_site: Callable[..., Path]) -> dict[int, dict[str, Any]]:
    names = ("aachen", "bonn", "chemnitz")
    return {
        11 * (n + 1): {"data-dir": str(make_site(name, seed=n)), "device": "cpu"}
        for n, name in enumerate(names)
    }


def test_a_study_leaves_its_run_folder(
    run_study: Run, three_sites: dict[int, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = run_study(three_sites)

    assert folder.path.is_absolute()
    assert (folder.path.parent / "latest").resolve() == folder.path
    assert json.loads((folder.path / "config.json").read_text())["train"]["patch-size"] == [16] * 3
    assert json.loads((folder.path / "plan.json").read_text())["spacing"] == [3, 3, 3]
    manifest = json.loads((folder.path / "manifest.json").read_text())
    assert manifest["status"] == "completed"
    assert list(manifest["sites"]) == ["aachen", "bonn", "chemnitz"]
    assert set(manifest["sha256"]) == {"model-last.safetensors", "model-best.safetensors"}
    assert not (folder.path / "checkpoint" / "spool").exists()
    shown = capsys.readouterr().out
    assert str(folder.path) in shown
    for word in ("liver", "tumor", "Dice", "volume similarity", "aachen", "federated"):
        assert word in shown


def test_history_has_a_line_a_round(run_study: Run, three_sites: dict[int, Any]) -> None:
    folder, _ = run_study(three_sites)

    lines = history(folder)
    assert [line["round"] for line in lines] == [0, 1, 2]
    for line in lines[1:]:
        assert list(line["sites"]) == ["aachen", "bonn", "chemnitz"]
        for site in line["sites"].values():
            assert (site["status"], site["reason"], site["weight"]) == ("ok", None, 2.0)
            assert site["bytes_up"] > 4 * 1000
            assert 0 <= site["metrics"]["liver.dice"] <= 1
        assert line["bytes_up"] == sum(site["bytes_up"] for site in line["sites"].values())
        assert line["federated"]["cases"] == 3
        assert line["privacy"] is None


def test_training_changes_every_weight(run_study: Run, three_sites: dict[int, Any]) -> None:
    one, _ = run_study(three_sites, {"federation.rounds": 1})
    two, _ = run_study(three_sites, {"federation.rounds": 2})

    moved = [not torch.equal(a, weights(two)[name]) for name, a in weights(one).items()]
    assert all(moved)


def test_same_seed_is_bit_identical_whatever_the_order(
    run_study: Run, three_sites: dict[int, Any]
) -> None:
    first, _ = run_study(three_sites)
    reordered = dict(reversed(three_sites.items()))
    again, _ = run_study(reordered, last_first=True)
    other, _ = run_study(three_sites, {"train.seed": 1})

    assert all(torch.equal(a, weights(again)[name]) for name, a in weights(first).items())
    assert not all(torch.equal(a, weights(other)[name]) for name, a in weights(first).items())


def test_kept_moments_change_the_second_round(run_study: Run, three_sites: dict[int, Any]) -> None:
    reset, _ = run_study(three_sites)
    kept, _ = run_study(three_sites, {"train.optimizer-state": "keep"})
    again, _ = run_study(three_sites, {"train.optimizer-state": "keep"})

    assert not all(torch.equal(a, weights(kept)[name]) for name, a in weights(reset).items())
    assert all(torch.equal(a, weights(again)[name]) for name, a in weights(kept).items())


def test_fedprox_sends_mu_and_stays_nearer(run_study: Run, three_sites: dict[int, Any]) -> None:
    many_steps = {"train.steps-per-epoch": 4, "federation.rounds": 1}
    plain, _ = run_study(three_sites, many_steps)
    near, grid = run_study(
        three_sites,
        {**many_steps, "federation.strategy": "fedprox", "federation.proximal-mu": 100.0},
    )
    sent = [m for m in grid.sent if m.metadata.message_type == "train"]
    assert {m.content["config"]["proximal-mu"] for m in sent} == {100.0}

    start = sent_weights(sent[0], weights(plain))
    plain_way = sum(float(((weights(plain)[k] - start[k]) ** 2).sum()) for k in start)
    near_way = sum(float(((weights(near)[k] - start[k]) ** 2).sum()) for k in start)
    assert near_way < plain_way


class TestWhatLeaves:
    """The message inspector: what a site may send, by key and type."""

    def inspect(self, message: Message) -> None:
        content = message.content
        assert not message.has_error()
        kind = message.metadata.message_type
        assert set(content["ledger"]) == {"hash"}
        assert re.fullmatch("[0-9a-f]{64}", content["ledger"]["hash"])
        if kind == "query.hello":
            assert set(content) == {"site", "ledger"}
            site = content["site"]
            assert set(site) == {"name", "simulated", "sites", "reason"}
            assert site["name"] in ("", "aachen", "bonn", "chemnitz")
            assert site["reason"] in ("", *list(Reason))
            return
        assert set(content) <= {"status", "metrics", "update", "fingerprint", "ledger"}
        if kind == "query.fingerprint" and content["status"]["status"] == "ok":
            assert set(content["fingerprint"]) == {"json"}
            found = json.loads(content["fingerprint"]["json"])
            assert set(found) == set(Fingerprint.model_fields)
            assert set(found["histograms"]) == set(EDGES)
            assert found["device"] in ("cpu", "cuda", "mps")
            assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in found["digests"])
            assert set(found["held_back"]) <= {*EDGES, "ct", "mr", "liver", "tumor"}
            return
        assert set(content["status"]) == {"status", "reason"}
        assert content["status"]["status"] in ("ok", "failed", "refused")
        assert content["status"]["reason"] in ("", *list(Reason))
        declared = set(TRAIN_METRICS) if kind == "train" else EVALUATION_KEYS
        assert set(content["metrics"]) <= declared
        assert all(type(value) is float for value in content["metrics"].values())
        for array in content["update"].values() if "update" in content else ():
            assert array.dtype == "float32"
            assert np.isfinite(array.numpy()).all()

    def test_numbers_under_declared_keys_only(
        self, run_study: Run, three_sites: dict[int, Any]
    ) -> None:
        _, grid = run_study(three_sites)
        assert {m.metadata.message_type for m in grid.received} == {
            "query.hello",
            "query.fingerprint",
            "train",
            "evaluate",
        }
        for message in grid.received:
            self.inspect(message)

    def test_the_same_when_a_site_fails(
        self, run_study: Run, three_sites: dict[int, Any], tmp_path: Path
    ) -> None:
        for mask in Path(three_sites[22]["data-dir"], "masks").iterdir():
            mask.write_bytes(b"broken")
        _, grid = run_study(three_sites)
        for message in grid.received:
            self.inspect(message)
            wire = repr(message.content.config_records).encode()
            assert str(tmp_path).encode() not in wire
            assert b"case-" not in wire


def broken(folder: str) -> None:
    for image in Path(folder, "images").iterdir():
        image.write_bytes(image.read_bytes()[:100])


def test_a_site_without_usable_case_costs_only_itself(
    run_study: Run, three_sites: dict[int, Any], caplog: pytest.LogCaptureFixture
) -> None:
    broken(three_sites[22]["data-dir"])
    folder, _ = run_study(three_sites)

    site = history(folder)[1]["sites"]["bonn"]
    assert (site["status"], site["reason"]) == ("failed", "no-cases")
    assert history(folder)[1]["sites"]["aachen"]["status"] == "ok"


def test_one_bad_case_is_skipped_and_counted(run_study: Run, three_sites: dict[int, Any]) -> None:
    first = sorted(Path(three_sites[11]["data-dir"], "masks").iterdir())[0]
    first.write_bytes(b"broken")
    folder, _ = run_study(three_sites)

    site = history(folder)[2]["sites"]["aachen"]
    assert (site["status"], site["training"]["skipped"]) == ("ok", 1)
    assert site["metrics"]["skipped"] == 1


def test_every_second_case_broken(
    run_study: Run, three_sites: dict[int, Any], make_site: Callable[..., Path]
) -> None:
    folder = make_site("dortmund", cases=8)
    for mask in sorted((folder / "masks").iterdir())[::2]:
        mask.write_bytes(mask.read_bytes()[:50])
    run, _ = run_study({**three_sites, 44: {"data-dir": str(folder)}}, {"federation.sites": 4})
    site = history(run)[1]["sites"]["dortmund"]
    assert site["status"] == "ok"
    assert (site["training"]["cases"], site["training"]["skipped"]) == (4, 4)
    assert site["metrics"]["cases"] == 0  # the two held-out ones are among the broken


def spoil(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Message], Message]:
    def reply(message: Message) -> Message:
        if message.metadata.message_type == "train":
            update = message.content["update"]
            name = next(iter(update))
            update[name] = Array(change(update[name].numpy()))
        return message

    return reply


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda a: np.full_like(a, np.nan), "not-finite"),
        (lambda a: np.full_like(a, np.inf), "not-finite"),
        (lambda a: a.astype(np.float64), "bad-update"),
        (lambda a: a.reshape(-1, 1), "bad-update"),
        (lambda a: a[:-1], "bad-update"),
    ],
    ids=["nan", "inf", "float64", "column", "short"],
)
def test_a_bad_update_costs_only_its_site(
    run_study: Run,
    three_sites: dict[int, Any],
    change: Callable[[np.ndarray], np.ndarray],
    reason: str,
) -> None:
    folder, _ = run_study(three_sites, reply={22: spoil(change)})

    assert all(bool(torch.isfinite(t).all()) for t in weights(folder).values())
    for line in history(folder)[1:]:
        assert line["sites"]["bonn"]["status"] == "failed"
        assert line["sites"]["bonn"]["reason"] == reason
    # The mean is that of the other two sites.
    others = {node: three_sites[node] for node in (11, 33)}
    alone, _ = run_study(others)
    assert all(torch.equal(a, weights(alone)[name]) for name, a in weights(folder).items())


def test_a_late_site_is_named(run_study: Run, three_sites: dict[int, Any]) -> None:
    def silent(message: Message) -> Message | None:
        return None if message.metadata.message_type == "train" else message

    folder, _ = run_study(
        three_sites,
        {"federation.round-deadline": 0.5, "federation.rounds": 1},
        reply={33: silent},
    )
    site = history(folder)[1]["sites"]["chemnitz"]
    assert (site["status"], site["reason"]) == ("late", "deadline")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("secret /data/patient-0042.nii.gz", "error"),
        ("alloc_cpu.cpp: can't allocate memory for patient-0042", "out-of-memory"),
    ],
)
def test_an_exception_at_a_site_leaves_no_trace_of_it(
    run_study: Run,
    three_sites: dict[int, Any],
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    reason: str,
) -> None:
    def fit(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(text)

    @contextlib.contextmanager
    def failing(message: Message) -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setitem(site_round.BACKENDS, "torch", fit)
            yield

    folder, grid = run_study(three_sites, around={22: failing})
    assert "patient-0042" not in (folder.path / "history.jsonl").read_text()
    assert not any("patient-0042" in repr(m.content.config_records) for m in grid.received)
    assert history(folder)[1]["sites"]["bonn"]["reason"] == reason


def test_too_few_good_updates_end_the_run(
    run_study: Run, three_sites: dict[int, Any], tmp_path: Path
) -> None:
    for node in (22, 33):
        broken(three_sites[node]["data-dir"])
    with pytest.raises(StudyError) as caught:
        run_study(three_sites)
    message = str(caught.value)
    assert "got 1 good updates; expected at least 2" in message
    assert "bonn: failed" in message
    assert str(tmp_path / "bonn") not in message
    (run,) = (tmp_path / "runs" / "0").glob("2*")
    assert json.loads((run / "manifest.json").read_text())["status"] == "failed"
    assert json.loads((run / "history.jsonl").read_text().splitlines()[-1])["round"] == 1


def test_sites_chosen_by_name(run_study: Run, three_sites: dict[int, Any]) -> None:
    folder, grid = run_study(three_sites, {"federation.sites": "chemnitz,aachen"})
    assert list(history(folder)[1]["sites"]) == ["aachen", "chemnitz"]
    trained = {m.metadata.dst_node_id for m in grid.sent if m.metadata.message_type == "train"}
    assert trained == {11, 33}


def test_registered_names_win(run_study: Run, three_sites: dict[int, Any]) -> None:
    folder, _ = run_study(three_sites, names={11: "uk-aachen"})
    assert list(history(folder)[1]["sites"]) == ["bonn", "chemnitz", "uk-aachen"]
    manifest = json.loads((folder.path / "manifest.json").read_text())
    assert manifest["sites"]["uk-aachen"]["verified"] is True
    assert manifest["sites"]["bonn"]["verified"] is False


def test_two_sites_of_one_name_are_refused(run_study: Run, three_sites: dict[int, Any]) -> None:
    with pytest.raises(StudyError, match="two nodes are named bonn"):
        run_study(three_sites, names={11: "bonn"})


def test_too_few_sites_in_time(run_study: Run, three_sites: dict[int, Any]) -> None:
    with pytest.raises(StudyError, match=r"got 3 within \d+ s; expected at least 5"):
        run_study(three_sites, {"federation.min-sites": 5, "federation.connect-deadline": 0.2})


class TestWhichNode:
    """A node is simulated, real, or refuses."""

    @pytest.mark.slow
    def test_simulated_phantoms(self, run_study: Run) -> None:
        nodes = {n: {"partition-id": n, "num-partitions": 2} for n in range(2)}
        config = {"data.phantom-cases": 2, "data.server-cases": 1, "train.spacing": "8,8,8"}
        folder, _ = run_study(nodes, {**config, "data.phantom-kinds": "portal,native"})
        line = history(folder)[2]
        assert list(line["sites"]) == ["site-0", "site-1"]
        assert (line["global"]["cases"], line["unseen"]["cases"]) == (2, 1)

    def test_simulated_folder_is_split(
        self, run_study: Run, make_site: Callable[..., Path]
    ) -> None:
        root = make_site("pool", cases=5)
        nodes = {n: {"partition-id": n, "num-partitions": 2} for n in range(2)}
        folder, _ = run_study(nodes, {"data.source": "folder", "data.dir": str(root)})
        cases = [site["training"]["cases"] for site in history(folder)[1]["sites"].values()]
        assert cases == [2.0, 1.0]  # 3 and 2 cases, one of each held out

    def test_simulated_subfolders(self, run_study: Run, make_site: Callable[..., Path]) -> None:
        root = make_site("pool/aachen").parent
        make_site("pool/bonn")
        nodes = {n: {"partition-id": n, "num-partitions": 2} for n in range(2)}
        folder, _ = run_study(
            nodes,
            {"data.source": "folder", "data.dir": str(root), "data.partition": "folders"},
        )
        assert list(history(folder)[1]["sites"]) == ["aachen", "bonn"]

    def test_a_node_with_neither_refuses(self, run_study: Run, three_sites: dict[int, Any]) -> None:
        _, grid = run_study({**three_sites, 44: {}})
        assert 44 not in {
            m.metadata.dst_node_id for m in grid.sent if m.metadata.message_type != "query.hello"
        }
        hello = [m for m in grid.received if m.metadata.src_node_id == 44]
        assert hello[0].content["site"]["reason"] == "no-data"

    def test_a_real_node_ignores_the_studys_data(
        self, run_study: Run, three_sites: dict[int, Any]
    ) -> None:
        folder, _ = run_study(three_sites, {"data.source": "folder", "data.dir": "/nowhere"})
        assert history(folder)[2]["federated"]["cases"] == 3


class TestPolicy:
    """What a site refuses, it refuses by name."""

    @pytest.mark.parametrize(
        ("key", "value", "reason"),
        [
            ("policy.min-cases", 4, "policy-min-cases"),
            ("policy.max-bytes", 1000, "policy-max-bytes"),
        ],
    )
    def test_refusal(
        self, run_study: Run, three_sites: dict[int, Any], key: str, value: int, reason: str
    ) -> None:
        three_sites[33][key] = value
        folder, _ = run_study(three_sites)
        site = history(folder)[1]["sites"]["chemnitz"]
        assert (site["status"], site["reason"]) == ("refused", reason)

    def test_another_study_config_is_refused(
        self, run_study: Run, three_sites: dict[int, Any]
    ) -> None:
        run_study(three_sites)
        grid = run_study.grid
        task = next(m for m in grid.sent if m.metadata.message_type == "train")
        other = {**grid.run_config, "train.seed": 5}
        context = Context(0, 11, three_sites[11], RecordDict(), other)
        answer = client_app.app(task, context)
        assert answer.content["status"]["reason"] == "config-mismatch"


CUSTOM = """
import torch
from torch import nn

class Network(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.first = nn.Conv3d(1, 4, 3, padding=1)
        self.norm = nn.InstanceNorm3d(4, affine=True)
        self.last = nn.Conv3d(4, classes, 1)
        self.register_buffer("version", torch.tensor([3, 1], dtype=torch.int64))
    def forward(self, x):
        return self.last(torch.relu(self.norm(self.first(x))))

def build(plan, in_channels, classes):
    return Network(classes)

def tuple_of_two(plan, in_channels, classes):
    network = Network(classes)
    network.forward = lambda x: (x, x)
    return network
"""


class TestCustomModel:
    """A network from outside."""

    @pytest.fixture(autouse=True)
    def package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        (tmp_path / "code").mkdir()
        (tmp_path / "code" / "hospital_net.py").write_text(CUSTOM)
        monkeypatch.syspath_prepend(str(tmp_path / "code"))
        yield
        sys.modules.pop("hospital_net", None)

    def allow(self, sites: dict[int, Any]) -> dict[int, Any]:
        return {n: {**c, "policy.allow-custom-code": True} for n, c in sites.items()}

    def test_runs_and_integer_buffers_keep_type_and_value(
        self, run_study: Run, three_sites: dict[int, Any]
    ) -> None:
        folder, _ = run_study(self.allow(three_sites), {"model.name": "hospital_net:build"})
        version = weights(folder)["version"]
        assert version.dtype == torch.int64
        assert version.tolist() == [3, 1]

    def test_a_site_without_consent_refuses(
        self, run_study: Run, three_sites: dict[int, Any]
    ) -> None:
        sites = self.allow(three_sites)
        del sites[22]["policy.allow-custom-code"]
        folder, _ = run_study(sites, {"model.name": "hospital_net:build"})
        site = history(folder)[1]["sites"]["bonn"]
        assert (site["status"], site["reason"]) == ("refused", "policy-custom-code")

    def test_the_site_that_lacks_the_package_is_named(
        self,
        run_study: Run,
        three_sites: dict[int, Any],
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        @contextlib.contextmanager
        def without(message: Message) -> Iterator[None]:
            site_work._built.cache_clear()
            with monkeypatch.context() as patch:
                patch.setitem(sys.modules, "hospital_net", None)
                patch.delitem(sys.modules, "hospital_net")
                patch.setattr(sys, "path", [p for p in sys.path if not p.endswith("/code")])
                yield
            site_work._built.cache_clear()

        folder, _ = run_study(
            self.allow(three_sites), {"model.name": "hospital_net:build"}, around={22: without}
        )
        site = history(folder)[1]["sites"]["bonn"]
        assert (site["status"], site["reason"]) == ("failed", "model-missing")

    def test_the_server_that_lacks_it(self, run_study: Run, three_sites: dict[int, Any]) -> None:
        with pytest.raises(StudyError, match="package not_there isn't installed at the SuperLink"):
            run_study(three_sites, {"model.name": "not_there:build"})

    def test_wrong_output_is_caught_before_the_run(
        self, run_study: Run, three_sites: dict[int, Any]
    ) -> None:
        with pytest.raises(ModelError, match="gave tuple; expected one logits tensor"):
            run_study(three_sites, {"model.name": "hospital_net:tuple_of_two"})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"train.batch-size": 0}, "train.batch-size: got 0; expected at least 1"),
        ({"train.patch-size": "18,16,16"}, "train.patch-size: got 18,16,16; expected multiples"),
        ({"model.depth": 5}, "16 leaves 1 voxel at the deepest of 5 levels"),
        ({"model.name": "unett"}, "model.name: got 'unett', did you mean 'unet'"),
        ({"model.name": "resnet!"}, "model.name: got 'resnet!'; expected one of unet, attention-"),
        ({"train.loss": "dice"}, "train.loss: got 'dice', did you mean 'dice-ce'"),
        ({"federation.strategy": "fedavgg"}, "federation.strategy: got 'fedavgg', did you mean"),
        ({"federation.weighting": "case"}, "federation.weighting: got 'case', did you mean"),
    ],
)
def test_impossible_config_stops_before_anything_is_sent(
    run_study: Run, three_sites: dict[int, Any], config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        run_study(three_sites, config)
    assert message in str(caught.value)
    assert run_study.grid.sent == []


def test_the_app_ends_with_one_line_and_no_traceback(
    three_sites: dict[int, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    context = Context(0, 1, {}, RecordDict(), {"train.learning-rate": "fast"})
    with pytest.raises(server_app.StudyFailed) as caught:
        server_app.app(None, context)
    assert caught.value.__traceback__ is None
    assert capsys.readouterr().err.strip() == (
        "fedseg: train.learning-rate: got 'fast'; expected a number"
    )


def test_a_start_from_a_model_file(run_study: Run, three_sites: dict[int, Any]) -> None:
    first, _ = run_study(three_sites)
    start = str(first.path / "model-last.safetensors")
    _, grid = run_study(three_sites, {"model.init-from": start})
    sent = next(m for m in grid.sent if m.metadata.message_type == "train")
    state = sent_weights(sent, weights(first))
    assert all(torch.equal(state[name], weights(first)[name]) for name in state)
    with pytest.raises(ModelError, match="its network is unet of width 4 and depth 3"):
        run_study(three_sites, {"model.init-from": start, "model.width": 8})


PLANNED = {"train.spacing": "", "train.ct-window": "", "train.batch-size": ""}


class TestFingerprints:
    """What is empty in the config is planned from what sites let leave."""

    def plan(self, folder: Any) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((folder.path / "plan.json").read_text())
        return found

    def test_sites_with_few_cases_hold_back_and_still_train(
        self, run_study: Run, three_sites: dict[int, Any]
    ) -> None:
        folder, grid = run_study(three_sites, PLANNED)
        assert self.plan(folder)["reasons"]["spacing"].startswith("default")
        assert history(folder)[1]["sites"]["aachen"]["status"] == "ok"
        answers = [m for m in grid.received if m.metadata.message_type == "query.fingerprint"]
        for answer in answers:
            found = Fingerprint.from_json(answer.content["fingerprint"]["json"])
            assert found.ct == 0 and "spacing.x" in found.held_back

    def test_sites_that_allow_it_are_planned_for(
        self, run_study: Run, three_sites: dict[int, Any]
    ) -> None:
        sites = {node: {**c, "policy.min-count": 1} for node, c in three_sites.items()}
        folder, _ = run_study(sites, PLANNED)
        plan = self.plan(folder)
        assert plan["spacing"] == pytest.approx([3, 3, 3], rel=0.06)
        low, high = plan["ct_window"]
        assert -30 < low < 60 and 140 < high < 220
        manifest = json.loads((folder.path / "manifest.json").read_text())
        assert manifest["fingerprints"] == ["aachen", "bonn", "chemnitz"]

    def test_a_site_that_shares_none_still_trains(
        self, run_study: Run, three_sites: dict[int, Any]
    ) -> None:
        three_sites[22]["policy.share-fingerprint"] = False
        three_sites[33]["policy.fingerprint-min-cases"] = 99
        folder, _ = run_study(three_sites, PLANNED)
        manifest = json.loads((folder.path / "manifest.json").read_text())
        assert manifest["fingerprints"] == ["aachen"]
        assert history(folder)[1]["sites"]["bonn"]["status"] == "ok"
        assert history(folder)[1]["sites"]["chemnitz"]["status"] == "ok"

    def test_scans_that_two_sites_hold_are_found_by_the_sites_key(
        self, run_study: Run, three_sites: dict[int, Any]
    ) -> None:
        aachen, bonn = (Path(three_sites[node]["data-dir"]) for node in (11, 22))
        for part in ("images", "masks"):
            shutil.copy(aachen / part / "case-0.nii.gz", bonn / part / "again.nii.gz")
        keyed = {node: {**c, "study-key": "k" * 16} for node, c in three_sites.items()}
        folder, grid = run_study(keyed, PLANNED)
        manifest = json.loads((folder.path / "manifest.json").read_text())
        assert manifest["shared_scans"] == [["aachen", "bonn", 1]]
        for message in grid.received:
            TestWhatLeaves().inspect(message)

        other_key = {**keyed, 22: {**keyed[22], "study-key": "another secret, 16+"}}
        folder, _ = run_study(other_key, PLANNED)
        manifest = json.loads((folder.path / "manifest.json").read_text())
        assert manifest["shared_scans"] == []

    def test_a_fixed_plan_asks_for_nothing(
        self, run_study: Run, three_sites: dict[int, Any]
    ) -> None:
        fixed = {"train.spacing": "3,3,3", "train.ct-window": "-100,200", "train.batch-size": 2}
        _, grid = run_study(three_sites, fixed)
        assert not any(m.metadata.message_type == "query.fingerprint" for m in grid.sent)

    def test_the_command_prints_the_bytes_that_leave(
        self,
        run_study: Run,
        three_sites: dict[int, Any],
        capsysbinary: pytest.CaptureFixture[bytes],
    ) -> None:
        _, grid = run_study(three_sites, PLANNED)
        sent = next(
            m.content["fingerprint"]["json"]
            for m in grid.received
            if m.metadata.message_type == "query.fingerprint" and m.metadata.src_node_id == 11
        )
        capsysbinary.readouterr()
        cli.fingerprint(Path(three_sites[11]["data-dir"]))
        assert capsysbinary.readouterr().out == sent.encode()
