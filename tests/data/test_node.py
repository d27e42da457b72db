"""Tests of what a node is and which cases it holds."""

import logging
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from fedseg.config import StudyConfig
from fedseg.data import phantom_sites, simulated_site
from fedseg.data.held_out import server_cases
from fedseg.data.node import open_site
from fedseg.data.phantom import KINDS, PhantomKind
from fedseg.data.phantom_sites import phantom_kinds
from fedseg.data.plan import Plan
from fedseg.data.planning import make_plan
from fedseg.data.prepared_cases import load_cases
from fedseg.errors import CaseError, ConfigError, DataError, Reason, SiteError

AFFINE = np.diag([3.0, 3, 3, 1])
SHAPE = (18, 17, 16)


def study_of(**changes: Any) -> StudyConfig:
    given = {key.replace("__", ".").replace("_", "-"): value for key, value in changes.items()}
    return StudyConfig.from_run_config({"train.patch-size": "16,16,16", **given})


def write_case(
    folder: Path, name: str, *, tumor: int = 3, values: dict[int, int] | None = None
) -> None:
    image = np.full(SHAPE, -1000, np.int16)
    image[1:-1, 1:-1, 1:-1] = 60
    labels = np.zeros(SHAPE, np.uint8)
    labels[4:12, 4:12, 4:12] = 1
    labels[5 : 5 + tumor, 5 : 5 + tumor, 5 : 5 + tumor] = 2
    for old, new in (values or {}).items():
        labels[labels == old] = new
    for part, array in (("images", image), ("masks", labels)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(array, AFFINE), folder / part / f"{name}.nii")


def write_site(folder: Path, cases: int = 3, toml: str = "") -> Path:
    for case in range(cases):
        write_case(folder, f"{folder.name}-{case}")
    (folder / "site.toml").write_text(toml)
    return folder


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSEG_HOME", str(tmp_path / "home"))


@pytest.fixture
def tiny_phantoms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real phantoms take seconds; these are told apart by kind and seed just as well."""

    def write(directory: Path, kind: PhantomKind, seeds: list[int], *, name: str) -> None:
        for seed in seeds:
            write_case(directory, f"{kind.name}-{seed}", tumor=1 + seed % 5)
        (directory / "site.toml").write_text(f'name = "{name}"\n')

    monkeypatch.setattr(phantom_sites, "write_phantom_site", write)


def names(cases: Any) -> list[str]:
    return [case.image.name.removesuffix(".nii") for case in cases]


def simulated(index: int, sites: int, **more: Any) -> dict[str, Any]:
    return {"partition-id": index, "num-partitions": sites, **more}


def refused(node_config: dict[str, Any], study: StudyConfig | None = None) -> SiteError:
    with pytest.raises(SiteError) as caught:
        open_site(node_config, study or study_of())
    return caught.value


@pytest.mark.parametrize("node_config", [{}, {"name": "aachen"}, {"data-dir": ""}])
def test_node_that_is_neither_simulated_nor_real_refuses(node_config: dict[str, Any]) -> None:
    assert refused(node_config).reason is Reason.NO_DATA


def test_real_site_ignores_the_studys_data(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_site(tmp_path / "aachen", toml='name = "aachen"\n')
    study = study_of(data__source="folder", data__dir="/nowhere", data__partition="size")
    with caplog.at_level(logging.INFO, "fedseg"):
        site = open_site({"data-dir": str(folder)}, study)
    assert (site.name, site.simulated, site.sites, site.unpaired) == ("aachen", False, 0, 0)
    assert names(site.cases) == ["aachen-0", "aachen-1", "aachen-2"]
    assert "data.* of the study config doesn't apply" in caplog.text


def test_data_dir_wins_over_partition_id(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_site(tmp_path / "aachen")
    with caplog.at_level(logging.WARNING, "fedseg"):
        site = open_site(simulated(0, 2, **{"data-dir": str(folder)}), study_of())
    assert not site.simulated
    assert len(site.cases) == 3
    assert "it is real" in caplog.text


def test_data_dir_may_come_from_the_named_site_config(tmp_path: Path) -> None:
    folder = write_site(tmp_path / "aachen", toml='name = "not-read"\n')
    settings = tmp_path / "settings.toml"
    settings.write_text(f'name = "bonn"\ndata-dir = "{folder}"\n')
    site = open_site({"site-config": str(settings)}, study_of())
    assert (site.name, site.simulated, len(site.cases)) == ("bonn", False, 3)
    settings.write_text('name = "bonn"\n')
    assert refused({"site-config": str(settings)}).reason is Reason.NO_DATA


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_site(tmp_path / "aachen", toml='name = "aachen"\n')
    monkeypatch.setenv("HOME", str(tmp_path))
    site = open_site({"data-dir": "~/aachen"}, study_of())
    assert (site.name, len(site.cases)) == ("aachen", 3)


def test_site_without_a_name_has_none(tmp_path: Path) -> None:
    assert open_site({"data-dir": str(write_site(tmp_path / "x"))}, study_of()).name == ""


@pytest.mark.parametrize(
    ("toml", "node_config", "words"),
    [
        ('devise = "cpu"', {}, "devise: unknown key.*did you mean 'device'"),
        ("", {"data-dirr": "x"}, "did you mean 'data-dir'"),
        ("", {"policy.min-case": 3}, "policy.min-case: unknown key.*'policy.min-cases'"),
        ("name = 3", {}, "name: got 3; expected a string"),
        ('name = "Aachen!"', {}, "name: got 'Aachen!'; expected a name of a-z"),
        ("", {"policy.min-cases": 0}, "policy.min-cases: got 0; expected at least 1"),
        ("name = ", {}, "not valid TOML"),
    ],
)
def test_wrong_site_config_is_named(
    tmp_path: Path, toml: str, node_config: dict[str, Any], words: str
) -> None:
    folder = write_site(tmp_path / "aachen", toml=toml)
    error = refused({"data-dir": str(folder), **node_config})
    assert error.reason is Reason.SITE_CONFIG
    with pytest.raises(SiteError, match=words):
        raise error


def test_folder_that_cannot_be_used(tmp_path: Path) -> None:
    assert refused({"data-dir": str(tmp_path / "nowhere")}).reason is Reason.DATA
    (tmp_path / "empty").mkdir()
    assert refused({"data-dir": str(tmp_path / "empty")}).reason is Reason.DATA
    assert refused({"site-config": str(tmp_path / "no.toml")}).reason is Reason.DATA


def test_partition_id_alone_is_a_config_error() -> None:
    error = refused({"partition-id": 0})
    assert error.reason is Reason.SITE_CONFIG
    assert "num-partitions" in str(error)


@pytest.mark.usefixtures("tiny_phantoms")
def test_phantom_sites_have_their_own_kind_and_seeds() -> None:
    study = study_of(data__phantom_cases=2, data__phantom_kinds="portal, native", data__seed=7)
    sites = [open_site(simulated(index, 3), study) for index in range(3)]
    assert [site.name for site in sites] == ["site-0", "site-1", "site-2"]
    assert [names(site.cases) for site in sites] == [
        ["portal-70000000", "portal-70000001"],
        ["native-70010000", "native-70010001"],
        ["portal-70020000", "portal-70020001"],
    ]
    assert all(site.simulated and site.sites == 3 for site in sites)
    other = open_site(simulated(0, 3), study_of(data__phantom_cases=2, data__seed=8))
    assert names(other.cases) == ["portal-80000000", "portal-80000001"]


def test_a_real_phantom_site_is_written_once(tmp_path: Path) -> None:
    study = study_of(data__phantom_cases=1, data__phantom_kinds="native")
    first = open_site(simulated(0, 2), study)
    (case,) = first.cases
    assert case.image.is_relative_to(tmp_path / "home" / "cache" / "phantoms")
    before = case.image.stat().st_mtime_ns
    assert open_site(simulated(0, 2), study) == first
    assert case.image.stat().st_mtime_ns == before


@pytest.mark.usefixtures("tiny_phantoms")
@pytest.mark.parametrize("way", ["size", "dirichlet"])
def test_phantoms_are_pooled_for_an_unequal_partition(way: str) -> None:
    study = study_of(data__phantom_cases=4, data__partition=way)
    held = [names(open_site(simulated(index, 3), study).cases) for index in range(3)]
    assert all(held)
    every = [name for cases in held for name in cases]
    assert len(every) == len(set(every)) == 12
    assert {name.rpartition("-")[0] for name in every} == {"portal", "arterial", "native"}


@pytest.mark.parametrize("way", ["iid", "size", "dirichlet"])
def test_one_folder_is_shared_by_all_simulated_sites(tmp_path: Path, way: str) -> None:
    folder = write_site(tmp_path / "pool", 7, toml='labels = "liver"\n')
    (folder / "images" / "unpaired.nii").touch()
    study = study_of(data__source="folder", data__dir=str(folder), data__partition=way)
    sites = [open_site(simulated(index, 3), study) for index in range(3)]
    every = sorted(name for site in sites for name in names(site.cases))
    assert every == [f"pool-{case}" for case in range(7)]
    assert [site.name for site in sites] == ["site-0", "site-1", "site-2"]
    assert all(site.config.labels == ("liver",) for site in sites)
    error = refused(simulated(0, 8), study)
    assert error.reason is Reason.DATA
    assert "got 7 cases for 8 simulated sites" in str(error)


def test_dirichlet_reads_the_tumour_load_through_the_label_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[float]] = []
    split = simulated_site.partition

    def spy(name: str, loads: list[float], **options: Any) -> list[list[int]]:
        seen.append(list(loads))
        return split(name, loads, **options)

    monkeypatch.setattr(simulated_site, "partition", spy)
    folder = tmp_path / "pool"
    for case in range(4):
        write_case(folder, f"case-{case}", tumor=case, values={1: 6, 2: 13})
    (folder / "site.toml").write_text('label-map = "6:1,13:2"\n')
    study = study_of(data__source="folder", data__dir=str(folder), data__partition="dirichlet")
    open_site(simulated(0, 2), study)
    assert seen == [[27.0 * case**3 for case in range(4)]]


def folders_study(root: Path) -> StudyConfig:
    return study_of(data__source="folder", data__dir=str(root), data__partition="folders")


def test_folders_partition_gives_each_sub_folder_its_own_site_toml(tmp_path: Path) -> None:
    root = tmp_path / "sites"
    write_site(root / "b", 1, toml='name = "bonn"\npolicy.min-cases = 2\n')
    write_site(root / "A Folder", 2, toml='labels = "liver"\n')
    (root / ".hidden").mkdir()
    (root / "notes.txt").touch()
    sites = [open_site(simulated(index, 2), folders_study(root)) for index in range(2)]
    assert [site.name for site in sites] == ["a-folder", "bonn"]
    assert [len(site.cases) for site in sites] == [2, 1]
    assert [site.config.labels for site in sites] == [("liver",), ("liver", "tumor")]
    assert [site.config.policy.min_cases for site in sites] == [1, 2]
    assert all(site.simulated for site in sites)


def test_folders_partition_wants_as_many_folders_as_sites(tmp_path: Path) -> None:
    root = tmp_path / "sites"
    for name in "abc":
        write_site(root / name, 1)
    error = refused(simulated(0, 2), folders_study(root))
    assert error.reason is Reason.DATA
    assert "3 sub-folders for 2 simulated sites" in str(error)
    assert "num-supernodes=3" in str(error)
    assert "no such folder" in str(refused(simulated(0, 2), folders_study(tmp_path / "no")))


def test_node_config_wins_over_site_toml(tmp_path: Path) -> None:
    folder = write_site(
        tmp_path / "aachen", toml='name = "aachen"\nmodality = "mr"\npolicy.min-cases = 5\n'
    )
    given = {"data-dir": str(folder), "name": "bonn", "policy.max-bytes": 7}
    config = open_site(given, study_of()).config
    assert (config.name, config.modality) == ("bonn", "mr")
    assert (config.policy.min_cases, config.policy.max_bytes) == (5, 7)


@pytest.fixture
def plan() -> Plan:
    return make_plan(study_of())


def break_case(folder: Path, name: str) -> None:
    (folder / "images" / name).write_bytes(b"broken")


def test_bad_cases_are_skipped_and_counted(
    tmp_path: Path, plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_site(tmp_path / "aachen", 6)
    break_case(folder, "aachen-2.nii")
    (folder / "masks" / "aachen-4.nii").unlink()
    site = open_site({"data-dir": str(folder)}, study_of())
    with caplog.at_level(logging.WARNING, "fedseg"):
        cases = load_cases(site, plan, validation_fraction=0.25, seed=0)
    assert cases.skipped == 2
    assert (len(cases.training), len(cases.validation)) == (3, 1)
    assert "aachen-2.nii: not a NIfTI file" in caplog.text


@pytest.mark.parametrize(
    ("cases", "fraction", "held_out"),
    [(1, 0.2, 0), (2, 0.2, 1), (2, 0.9, 1), (5, 0.2, 1), (5, 0.0, 0), (10, 0.3, 3)],
)
def test_some_cases_are_held_out_and_one_is_always_left(
    tmp_path: Path, plan: Plan, cases: int, fraction: float, held_out: int
) -> None:
    folder = write_site(tmp_path / "aachen", cases)
    site = open_site({"data-dir": str(folder)}, study_of())
    first, again = (load_cases(site, plan, validation_fraction=fraction, seed=4) for _ in range(2))
    assert (len(first.training), len(first.validation)) == (cases - held_out, held_out)
    files = [[c.image.filename for c in part] for part in (first.training, first.validation)]  # type: ignore[attr-defined]
    assert not set(files[0]) & set(files[1])
    assert files == [
        [c.image.filename for c in part] for part in (again.training, again.validation)
    ]  # type: ignore[attr-defined]


def test_site_without_a_usable_case_has_none_to_train_on(tmp_path: Path, plan: Plan) -> None:
    folder = write_site(tmp_path / "aachen", 2)
    for case in range(2):
        break_case(folder, f"aachen-{case}.nii")
    site = open_site({"data-dir": str(folder)}, study_of())
    cases = load_cases(site, plan, validation_fraction=0.2, seed=0)
    assert (cases.training, cases.validation, cases.skipped) == ((), (), 2)


def test_cache_that_cannot_be_written_is_a_reason(tmp_path: Path, plan: Plan) -> None:
    folder = write_site(tmp_path / "aachen", 1)
    (tmp_path / "file").touch()
    site = open_site({"data-dir": str(folder), "cache-dir": str(tmp_path / "file")}, study_of())
    with pytest.raises(SiteError, match="can't write the cache") as caught:
        load_cases(site, plan, validation_fraction=0.2, seed=0)
    assert caught.value.reason is Reason.DATA


def test_cases_go_into_the_sites_own_cache(tmp_path: Path, plan: Plan) -> None:
    folder = write_site(tmp_path / "aachen", 1)
    load_cases(
        open_site({"data-dir": str(folder), "cache-dir": str(tmp_path / "own")}, study_of()),
        plan,
        validation_fraction=0.2,
        seed=0,
    )
    assert len(list((tmp_path / "own" / "cases").iterdir())) == 1
    assert not (tmp_path / "home").exists()


@pytest.mark.usefixtures("tiny_phantoms")
def test_server_has_phantoms_only_where_all_sites_are_phantoms(plan: Plan, tmp_path: Path) -> None:
    study = study_of(data__server_cases=2)
    held = server_cases(study, plan, simulated=True)
    assert {name: len(group.cases) for name, group in held.items()} == {"global": 6, "unseen": 2}
    assert server_cases(study, plan, simulated=False) == {}
    assert server_cases(study_of(data__server_cases=0), plan, simulated=True) == {}
    folder = study_of(data__source="folder", data__dir=str(tmp_path))
    assert server_cases(folder, plan, simulated=True) == {}


def test_server_phantoms_are_of_seeds_that_no_site_has(
    monkeypatch: pytest.MonkeyPatch, plan: Plan
) -> None:
    written: list[tuple[str, int]] = []

    def write(directory: Path, kind: PhantomKind, seeds: list[int], *, name: str) -> None:
        for seed in seeds:
            written.append((kind.name, seed))
            write_case(directory, f"{kind.name}-{seed}")

    monkeypatch.setattr(phantom_sites, "write_phantom_site", write)
    study = study_of(data__server_cases=2, data__phantom_cases=2)
    for index in range(3):
        open_site(simulated(index, 3), study)
    of_sites = set(written)
    written.clear()
    server_cases(study, plan, simulated=True)
    assert len(of_sites) == 6
    assert not of_sites & set(written)
    assert "late" in {kind for kind, _ in written}
    assert "late" not in KINDS


def test_server_dir_holds_the_servers_cases(tmp_path: Path, plan: Plan) -> None:
    folder = write_site(tmp_path / "held-out", 2)
    study = study_of(data__server_dir=str(folder))
    held = server_cases(study, plan, simulated=False)
    assert {name: len(group.cases) for name, group in held.items()} == {"global": 2}
    assert held["global"].annotated == ("liver", "tumor")
    (folder / "site.toml").write_text('labels = "liver"\n')
    assert server_cases(study, plan, simulated=False)["global"].annotated == ("liver",)
    break_case(folder, "held-out-1.nii")
    with pytest.raises(DataError, match=r"server's cases: .*held-out-1.nii: not a NIfTI") as caught:
        server_cases(study, plan, simulated=False)
    assert not isinstance(caught.value, CaseError)
    (folder / "masks" / "held-out-0.nii").unlink()
    with pytest.raises(DataError, match=r"data.server-dir: .*no mask in masks/"):
        server_cases(study, plan, simulated=False)
    with pytest.raises(DataError, match="no such folder"):
        server_cases(study_of(data__server_dir=str(tmp_path / "no")), plan, simulated=False)


def test_unknown_phantom_kind_is_named() -> None:
    study = study_of(data__phantom_kinds="portal,venous")
    with pytest.raises(ConfigError, match=r"data.phantom-kinds: got 'venous'; expected some of"):
        phantom_kinds(study)
    assert refused(simulated(0, 2), study).reason is Reason.SITE_CONFIG


def test_every_kind_can_be_named() -> None:
    kinds = phantom_kinds(study_of(data__phantom_kinds=",".join(KINDS)))
    assert kinds == list(KINDS.values())
