from __future__ import annotations

import itertools
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt.core.artifact import create_artifact
from minigpt.core.errors import ArtifactError, GateError, RegistryError
from minigpt.release.registry import Registry
from minigpt.release.version import NothingThereYetError

from .conftest import MakeModel, MakeReport


def test_a_version_knows_its_data_code_run_and_verdict(
    registry: Registry, make_model: MakeModel, make_report: MakeReport, tmp_path: Path
) -> None:
    model = make_model()
    report = make_report(model)
    version = registry.register(model.path, "tiny", report.uri)
    assert version.reference == "tiny/1" and version.verdict == "pass"
    found = registry.get("tiny/1")
    assert found == version
    assert found.origin.artifact_id == model.id
    assert found.origin.artifact_uri == str(model.path)
    assert found.origin.data_id == model.manifest.parents[0].id
    assert found.origin.data_uri == str(tmp_path / "data")
    assert found.origin.run_dir == str(model.path.parent)
    assert found.origin.code_commit.startswith(model.manifest.code.commit)
    assert found.evidence[0].report_id == report.id


def test_a_compressed_model_keeps_the_lineage_of_its_parent(
    registry: Registry, make_model: MakeModel, tmp_path: Path
) -> None:
    model = make_model()
    with create_artifact(tmp_path / "int8", kind="model", parents=[model]) as draft:
        (draft.path / "config.json").write_text("{}")
    version = registry.register(tmp_path / "int8", "tiny")
    assert version.origin.data_id == model.manifest.parents[0].id
    assert version.origin.run_dir == str(model.path.parent)


def test_registering_again_adds_evidence_and_no_version(
    registry: Registry, make_model: MakeModel, make_report: MakeReport
) -> None:
    model = make_model()
    registry.register(model.path, "tiny")
    first = make_report(model, "insufficient", "first")
    second = make_report(model, "pass", "second")
    for report in (first, second, second):
        registry.register(model.path, "tiny", report.uri)
    (version,) = registry.versions("tiny")
    assert [each.verdict for each in version.evidence] == ["insufficient", "pass"]
    assert registry.register(make_model("other").path, "tiny").version == 2


@pytest.mark.parametrize("verdict", ["fail", "insufficient", None])
def test_promotion_needs_a_gate_that_passed(
    registry: Registry, make_model: MakeModel, make_report: MakeReport, verdict: str | None
) -> None:
    model = make_model()
    registry.register(model.path, "tiny")
    for alias in ("champion", "challenger"):
        with pytest.raises(GateError, match="no gate has judged tiny/1"):
            registry.promote("tiny/1", alias)
    registry.register(model.path, "tiny", make_report(model, verdict).uri)
    with pytest.raises(GateError, match=str(verdict or "none")) as error:
        registry.promote("tiny/1")
    assert error.value.exit_code == 1
    assert ("): mean_kl is 0.2, must be at most 0.1" in str(error.value)) == (verdict == "fail")
    assert registry.models() == {"tiny": {}}
    assert registry.history("tiny") == []


def test_promotion_looks_at_the_files(
    registry: Registry, make_model: MakeModel, make_report: MakeReport
) -> None:
    model = make_model()
    report = make_report(model)
    registry.register(model.path, "tiny", report.uri)
    weights = model.path / "model.safetensors.txt"
    weights.write_text("m0del")
    with pytest.raises(ArtifactError, match=r"model\.safetensors\.txt is corrupt"):
        registry.promote("tiny/1")
    weights.write_text("model")
    (report.path / "report.json").write_text("[]")
    with pytest.raises(ArtifactError, match=r"report\.json is corrupt"):
        registry.promote("tiny/1")
    (report.path / "report.json").write_text("{}")
    assert registry.promote("tiny/1") is not None


def test_a_replaced_artifact_is_not_the_registered_one(
    registry: Registry, make_model: MakeModel, make_report: MakeReport
) -> None:
    model = make_model()
    registry.register(model.path, "tiny", make_report(model).uri)
    shutil.rmtree(model.path)
    with pytest.raises(ArtifactError, match="no artifact at"):
        registry.resolve("tiny/1")
    make_model("model", content="something else")
    with pytest.raises(ArtifactError, match="not the artifact registered as tiny/1"):
        registry.resolve("tiny/1")
    with pytest.raises(ArtifactError, match="not the artifact registered as tiny/1"):
        registry.promote("tiny/1")


def test_report_of_another_model_is_refused(
    registry: Registry, make_model: MakeModel, make_report: MakeReport
) -> None:
    report = make_report(make_model("other"))
    with pytest.raises(RegistryError, match="is of another model"):
        registry.register(make_model().path, "tiny", report.uri)
    assert registry.models() == {}


def test_history_keeps_every_change_in_order(
    registry: Registry, make_model: MakeModel, make_report: MakeReport
) -> None:
    for name in ("a", "b"):
        model = make_model(name)
        registry.register(model.path, "tiny", make_report(model).uri)
    registry.promote("tiny/1", by="ann", why="first")
    registry.promote("tiny/2", "challenger")
    registry.promote("tiny@challenger", by="ann", why="better")
    assert registry.promote("tiny/2") is None
    registry.promote("tiny/1", why="rolled back")
    changes = [
        (change.alias, change.from_version, change.to_version)
        for change in registry.history("tiny")
    ]
    assert changes == [
        ("champion", None, 1), ("challenger", None, 2), ("champion", 1, 2), ("champion", 2, 1),
    ]  # fmt: skip
    first, *_, last = registry.history("tiny")
    assert (first.by, first.why) == ("ann", "first") and "@" in last.by
    assert registry.get("champion").version == 1
    assert registry.get("tiny").aliases == ("champion",)


def test_changes_by_other_tools_and_interrupted_ones_are_noted(
    registry: Registry, make_model: MakeModel, make_report: MakeReport
) -> None:
    for name in ("a", "b"):
        model = make_model(name)
        registry.register(model.path, "tiny", make_report(model).uri)
    registry.promote("tiny/1")
    client = registry._store._client
    client.set_registered_model_alias("tiny", "champion", "2")
    noted = registry.history("tiny")[-1]
    assert (noted.from_version, noted.to_version, noted.by) == (1, 2, "unknown")
    client.delete_registered_model_alias("tiny", "champion")
    assert registry.history("tiny")[-1].to_version is None
    # A crash between the record and the change: the record is taken back by another.
    change = registry.history("tiny")[0]
    registry._store.history.append(change.replace(from_version=None, to_version=2))
    registry.promote("tiny/1")
    changes = [(c.from_version, c.to_version) for c in registry.history("tiny")]
    assert changes == [(None, 1), (1, 2), (2, None), (None, 2), (2, None), (None, 1)]


def test_the_history_can_not_be_rewritten(
    registry: Registry, make_model: MakeModel, make_report: MakeReport, database: Path
) -> None:
    model = make_model()
    registry.register(model.path, "tiny", make_report(model).uri)
    registry.promote("tiny/1")
    with sqlite3.connect(database) as connection:
        for statement in (
            "DELETE FROM minigpt_alias_changes",
            "UPDATE minigpt_alias_changes SET why = ''",
        ):
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                connection.execute(statement)


def test_references(
    registry: Registry, make_model: MakeModel, make_report: MakeReport, tmp_path: Path
) -> None:
    with pytest.raises(NothingThereYetError, match="no model has a champion"):
        registry.resolve("champion")
    for name in ("a", "b"):
        model = make_model(name)
        registry.register(model.path, name, make_report(model).uri)
    registry.promote("a/1")
    assert registry.resolve("champion") == registry.resolve("a") == registry.resolve("a/1")
    assert registry.resolve("a@champion") == tmp_path / "runs" / "a" / "model"
    assert registry.resolve(model.path) == model.path
    assert registry.newest("b").version == 1
    registry.promote("b/1")
    for reference, message in {
        "champion": "several models have a champion: a, b",
        "challenger": "no model has a challenger",
        "a@challenger": "a has no challenger",
        "a/2": "a has no version 2",
        "c": "no model 'c'",
        "c/1": "no model 'c'",
        "runs/never/model": "neither a path that exists nor",
        "a@prod": "neither a path that exists nor",
        str(tmp_path / "runs"): "holds no model",
    }.items():
        with pytest.raises((RegistryError, ArtifactError), match=message) as error:
            registry.resolve(reference)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["champion", "a/b", "a@b", "", "-x", "x" * 200])
def test_names_that_references_could_not_say_are_refused(
    registry: Registry, make_model: MakeModel, name: str
) -> None:
    with pytest.raises(RegistryError, match="can't be used"):
        registry.register(make_model().path, name)


def test_unknown_alias_and_unreachable_registry(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="alias 'prod' is unknown"):
        registry.promote("a/1", "prod")
    (tmp_path / "file.db").write_text("this is no database at all" * 100)
    with pytest.raises(RegistryError, match="in the registry sqlite:///") as error:
        Registry(f"sqlite:///{tmp_path / 'file.db'}").models()
    assert "\n" not in str(error.value)


REGISTER = """
import sys
from minigpt.release.registry import Registry
registry = Registry(sys.argv[1])
for model in sys.argv[2:]:
    print(registry.register(model, "shared").version, flush=True)
"""


def test_processes_that_register_at_once_lose_nothing(
    make_model: MakeModel, tmp_path: Path
) -> None:
    """Three at once, on a registry that does not exist yet, and all register one model too."""
    uri = f"sqlite:///{tmp_path / 'new' / 'mlflow.db'}"
    common = str(make_model("common").path)
    own = [[str(make_model(f"{p}-{i}").path) for i in range(4)] for p in range(3)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", REGISTER, uri, common, *models],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for models in own
    ]  # fmt: skip
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert [error for _, error in outputs] == ["", "", ""]
    numbers = [[int(line) for line in out.split()] for out, _ in outputs]
    assert len({each[0] for each in numbers}) == 1
    versions = Registry(uri).versions("shared")
    assert [version.version for version in versions] == list(range(1, 14))
    assert {version.origin.artifact_uri for version in versions} == {common, *itertools.chain(*own)}
