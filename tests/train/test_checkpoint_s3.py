"""Checkpoints in S3: a real server on this machine (moto), real requests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
from moto.moto_server.threaded_moto_server import ThreadedMotoServer
from s3fs import S3FileSystem
from tests.train.rank_processes import launch

from minigpt.core.errors import ArtifactError, StorageError
from minigpt.train.checkpoint import CheckpointStore, TrainState
from minigpt.train.checkpoint_location import RemoteLocation

URL = "s3://bucket/run"
PREFIX = "run/step-00000001"
OTHERS = (
    "index.json",
    "model.safetensors",
    "optimizer.safetensors",
    "rng.safetensors",
    "state.json",
)
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_MAX_ATTEMPTS": "1",
}


class Server:
    """A server that can be away for a while; it comes back on the same port, objects and all."""

    def __init__(self) -> None:
        self._port = 0
        self.start()
        self.environment = CREDENTIALS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._port}"}

    def start(self) -> None:
        self._server = ThreadedMotoServer("127.0.0.1", self._port, verbose=False)
        self._server.start()
        _, self._port = self._server.get_host_and_port()

    def stop(self) -> None:
        self._server.stop()

    def client(self) -> Any:
        return boto3.client("s3")

    def listing(self) -> list[str]:
        found = self.client().list_objects_v2(Bucket="bucket").get("Contents", [])
        return sorted(entry["Key"] for entry in found)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    server = Server()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MINIGPT_HOME", str(tmp_path))
    S3FileSystem.clear_instance_cache()
    server.client().create_bucket(Bucket="bucket")
    yield server
    for key in server.listing():
        server.client().delete_object(Bucket="bucket", Key=key)
    server.stop()
    S3FileSystem.clear_instance_cache()


def _contents(step: int) -> dict[str, Any]:
    weight = torch.randn(40, 10, generator=torch.Generator().manual_seed(step))
    return {"model": {"w": weight}, "optimizer": {"w/exp_avg": weight / 3}, "parents": []}


def test_saved_kept_loaded_and_verified(
    server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    store = CheckpointStore(URL, keep=2)
    assert store.load_latest() is None
    store.save(TrainState(step=1), **_contents(1))
    for step in (2, 3):
        store.save_async(TrainState(step=step), **_contents(step)).result()
    assert store.steps() == [2, 3]
    with pytest.raises(ArtifactError, match="exists"):
        store.save(TrainState(step=3), **_contents(3))
    found = store.load_latest()
    assert found is not None and torch.equal(found.model["w"], _contents(3)["model"]["w"])
    assert found.artifact.uri == f"{URL}/step-00000003"
    key = "run/step-00000003/optimizer.safetensors"
    body = bytearray(server.client().get_object(Bucket="bucket", Key=key)["Body"].read())
    body[-1] ^= 1
    server.client().put_object(Bucket="bucket", Key=key, Body=bytes(body))
    store = CheckpointStore(URL, keep=2)
    found = store.load_latest()
    assert found is not None and torch.equal(found.model["w"], _contents(2)["model"]["w"])
    captured = capfd.readouterr()
    assert "optimizer.safetensors is corrupt" in captured.out + captured.err
    assert store.steps() == [2]
    CheckpointStore(URL, keep=2)  # what was set aside stays for inspection
    assert key in server.listing()
    store.save(TrainState(step=3), **_contents(3))
    assert store.steps() == [2, 3]
    assert not [p for p in (tmp_path / "downloads").rglob("*") if p.is_file()]


def test_the_manifest_comes_last_and_what_lacks_it_does_not_exist(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    commit = RemoteLocation.commit

    def watched(*arguments: Any) -> None:
        seen.append(server.listing())
        commit(*arguments)

    monkeypatch.setattr(RemoteLocation, "commit", watched)
    store = CheckpointStore(URL, keep=2)
    store.save(TrainState(step=1), **_contents(1))
    assert seen == [[f"{PREFIX}/{name}" for name in OTHERS]]
    assert server.listing() == sorted([*seen[0], f"{PREFIX}/manifest.json"])
    server.client().put_object(
        Bucket="bucket", Key="run/step-00000002/model.safetensors", Body=b"half"
    )
    assert store.steps() == [1]
    found = CheckpointStore(URL, keep=2).load_latest()
    assert found is not None and found.state.step == 1
    assert all("00000002" not in key for key in server.listing())


def test_a_lost_server_costs_the_save_and_not_the_run(server: Server) -> None:
    store = CheckpointStore(URL, keep=2)
    store.save(TrainState(step=1), **_contents(1))
    server.stop()
    with pytest.raises(StorageError, match="check the URL, the credentials and the connection"):
        store.save(TrainState(step=2), **_contents(2))
    pending = store.save_async(TrainState(step=3), **_contents(3))
    with pytest.raises(StorageError):
        pending.result()
    with pytest.raises(StorageError):
        store.load_latest()
    server.start()
    store.save(TrainState(step=4), **_contents(4))
    assert store.steps() == [1, 4]


def _save_and_load(rank: int, world: int, environment: dict[str, str]) -> list[float]:
    os.environ.update(environment)
    store = CheckpointStore(URL, keep=2)
    store.save_async(TrainState(step=1), **_contents(1)).result()
    found = store.load_latest(_contents(1)["model"])
    assert found is not None
    store.close()
    return found.model["w"].sum().tolist()


def test_ranks_upload_and_fetch_together(server: Server, tmp_path: Path) -> None:
    environment = server.environment | {"MINIGPT_HOME": str(tmp_path)}
    expected = _contents(1)["model"]["w"].sum().item()
    assert launch(_save_and_load, 2, environment=environment) == [expected, expected]
    found = CheckpointStore(URL, keep=2).load_latest()
    assert found is not None and torch.equal(found.model["w"], _contents(1)["model"]["w"])
