import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
from safetensors.numpy import save_file

from minigpt.core.artifact import Artifact, create_artifact, lineage, open_artifact
from minigpt.core.errors import ArtifactError, MinigptError, StorageError
from minigpt.core.manifest import MANIFEST, TensorEntry, hash_tensors


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    with create_artifact(tmp_path / "model", kind="model", config={"width": 4}) as draft:
        (draft.path / "text").mkdir()
        (draft.path / "text" / "a.txt").write_text("hello")
        save_file({"w": np.arange(6, dtype=np.float32)}, draft.path / "model.safetensors")
        draft.metrics["loss"] = 1.5
    assert draft.artifact is not None
    return draft.artifact


def test_manifest_describes_every_file_and_tensor(artifact: Artifact) -> None:
    found = open_artifact(artifact.path, kind="model")
    assert found.id == artifact.id
    manifest = found.manifest
    assert set(manifest.files) == {"text/a.txt", "model.safetensors"}
    assert manifest.tensors["w"].shape == (6,)
    assert manifest.config == {"width": 4}
    assert manifest.metrics == {"loss": 1.5}
    assert manifest.code.version


@pytest.mark.parametrize("name", ["model.safetensors", "text/a.txt", MANIFEST])
def test_a_flipped_bit_is_refused_by_name(artifact: Artifact, name: str) -> None:
    path = artifact.path / name
    original = path.read_bytes()
    for position in (0, len(original) // 2, len(original) - 2):
        damaged = bytearray(original)
        damaged[position] ^= 1
        path.write_bytes(bytes(damaged))
        with pytest.raises(ArtifactError, match=name):
            open_artifact(artifact.path)
    path.write_bytes(original)
    open_artifact(artifact.path)


@pytest.mark.parametrize("name", ["model.safetensors", "text/a.txt", MANIFEST])
def test_truncated_and_missing_files_are_refused_by_name(artifact: Artifact, name: str) -> None:
    path = artifact.path / name
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ArtifactError, match=name):
        open_artifact(artifact.path, verify=False)
    path.unlink()
    with pytest.raises(ArtifactError, match=name):
        open_artifact(artifact.path, verify=False)


def test_newer_manifest_extra_file_and_wrong_kind_are_refused(artifact: Artifact) -> None:
    with pytest.raises(ArtifactError, match="is a model artifact, but a dataset is needed"):
        open_artifact(artifact.path, kind="dataset")
    (artifact.path / "extra").touch()
    with pytest.raises(ArtifactError, match="extra is not in the manifest"):
        open_artifact(artifact.path)
    (artifact.path / "extra").unlink()
    manifest = json.loads((artifact.path / MANIFEST).read_text())
    manifest |= {"format_version": 99, "from_the_future": True}
    (artifact.path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"manifest\.json has format version 99.*upgrade"):
        open_artifact(artifact.path)


def test_artifacts_are_never_overwritten(artifact: Artifact) -> None:
    with (
        pytest.raises(ArtifactError, match="never changed"),
        create_artifact(artifact.path, kind="model"),
    ):
        pass


def test_a_failed_writer_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError),
        create_artifact(tmp_path / "a", kind="report") as draft,
    ):
        (draft.path / "half").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(StorageError, match=r"no space left on device .*free space"),
        create_artifact(tmp_path / "a", kind="report"),
        Path("/dev/full").open("wb") as full,
    ):
        full.write(b"x" * 100_000)
    assert list(tmp_path.iterdir()) == []


def test_tensor_hashes_do_not_depend_on_sharding(tmp_path: Path) -> None:
    tensors = {
        name: np.random.default_rng(i).normal(size=(3, i + 1)) for i, name in enumerate("abc")
    }
    save_file(tensors, tmp_path / "all.safetensors")
    sharded: dict[str, TensorEntry] = {}
    for name, tensor in tensors.items():
        save_file({name: tensor}, tmp_path / f"{name}.safetensors")
        sharded |= hash_tensors(tmp_path / f"{name}.safetensors")
    assert hash_tensors(tmp_path / "all.safetensors") == sharded


def test_lineage_walks_parents_and_marks_lost_ones(artifact: Artifact, tmp_path: Path) -> None:
    with create_artifact(tmp_path / "report", kind="report", parents=[artifact]) as draft:
        (draft.path / "r.txt").write_text("fine")
    assert draft.artifact is not None
    tree = lineage(draft.artifact)
    assert [a.parent.id for a in tree.ancestors] == [artifact.id]
    assert tree.ancestors[0].artifact is not None
    (artifact.path / MANIFEST).unlink()
    assert lineage(draft.artifact).ancestors[0].artifact is None


def test_remote_round_trip(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MINIGPT_HOME", str(tmp_path / "home"))
    url = f"memory://{tmp_path.name}/report"
    with create_artifact(url, kind="report", parents=[artifact]) as draft:
        (draft.path / "sub").mkdir()
        (draft.path / "sub" / "r.txt").write_text("fine")
    assert draft.artifact is not None
    found = open_artifact(url, kind="report")
    assert found.id == draft.artifact.id
    assert found.uri == url
    assert (found.path / "sub" / "r.txt").read_text() == "fine"
    with pytest.raises(MinigptError, match=r"holds no manifest\.json"):
        open_artifact(url + "-elsewhere")
    assert fsspec.filesystem("memory").exists(f"/{tmp_path.name}/report/{MANIFEST}")


WRITER = """
import sys
from pathlib import Path
from minigpt.core.artifact import create_artifact
for i in range(1000):
    with create_artifact(Path(sys.argv[1]) / f"a{i}", kind="report") as draft:
        for j in range(4):
            (draft.path / str(j)).write_bytes(bytes(50_000))
"""


def test_kill_9_leaves_whole_artifacts_or_none(tmp_path: Path) -> None:
    for delay in (0.02, 0.05, 0.11):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / str(delay))])
        while not list((tmp_path).glob(f"{delay}/a*")):
            time.sleep(0.01)
        time.sleep(delay)
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        whole = list((tmp_path / str(delay)).glob("a*"))
        assert whole
        for path in whole:
            open_artifact(path)


def test_a_dead_writers_leftover_is_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    leftover = tmp_path / f".a.{dead.pid}.tmp"
    leftover.mkdir()
    with create_artifact(tmp_path / "a", kind="report") as draft:
        (draft.path / "x").touch()
    assert not leftover.exists()
    assert (tmp_path / "a").exists()
