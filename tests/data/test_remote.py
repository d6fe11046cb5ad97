"""Shards behind S3: a real moto server, a real failing proxy, real bytes."""

from __future__ import annotations

import http.client
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np
import pytest
import torch

from minigpt.core.errors import ArtifactError, StorageError
from minigpt.core.manifest import MANIFEST
from minigpt.core.retry import Retry
from minigpt.core.storage import upload_directory
from minigpt.data.loader import BatchLoader
from minigpt.data.remote import CACHE_BYTES_VARIABLE, RemoteShards, ShardCache, open_remote
from minigpt.data.shards import TokenDataset

if TYPE_CHECKING:
    from tests.data.conftest import MakeDataset

SHARD_BYTES = 2000  # of uint16 tokens
ONCE = Retry(attempts=1)


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Start an S3 server and return a boto3 client with the bucket `corpus`."""
    import boto3

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (tmp_path_factory.mktemp("moto") / "log").open("wb")
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=log, stderr=log)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        try:
            client = boto3.client("s3")
            deadline = time.monotonic() + 60
            while True:
                try:
                    client.create_bucket(Bucket="corpus")
                    break
                except Exception:
                    assert time.monotonic() < deadline and server.poll() is None
                    time.sleep(0.2)
            yield client
        finally:
            server.kill()
            server.wait()
            log.close()


@pytest.fixture(scope="module")
def local(make_dataset: MakeDataset) -> Path:
    return make_dataset([400] * 25, seed=8, shard_tokens=SHARD_BYTES // 2)


@pytest.fixture
def url(s3: Any, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Upload the dataset to a place of its own; minigpt's home is new as well."""
    monkeypatch.setenv("MINIGPT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv(CACHE_BYTES_VARIABLE, str(20 * SHARD_BYTES))
    _forget_connections()
    place = f"s3://corpus/{tmp_path.name}"
    upload_directory(local, place, last=MANIFEST)
    return place


def _forget_connections() -> None:
    fsspec.filesystem("s3").invalidate_cache()
    type(fsspec.filesystem("s3")).clear_instance_cache()


def cached(home: Path) -> list[Path]:
    return [path for path in (home / "cache" / "shards").iterdir() if path.is_file()]


def remote_shards(place: str, **options: Any) -> RemoteShards:
    found = open_remote(place)
    names = [name for name in sorted(found.manifest.files) if name.startswith("train-")]
    return RemoteShards(found.path, names, "<u2", **options)


def test_it_reads_as_the_local_one_and_fetches_only_what_is_read(
    url: str, local: Path, tmp_path: Path
) -> None:
    here, there = TokenDataset.open(local, "train"), TokenDataset.open(url, "train")
    assert there.is_remote and not here.is_remote
    assert there.fingerprint == here.fingerprint
    assert not (tmp_path / "home" / "cache" / "shards").exists()
    assert there.document(0).tolist() == here.document(0).tolist()
    assert len(cached(tmp_path / "home")) == 1
    assert there.tokens(900, 3100).tolist() == here.tokens(900, 3100).tolist()
    assert len(cached(tmp_path / "home")) == 4
    every = range(here.num_documents)
    assert all(there.document(i).tolist() == here.document(i).tolist() for i in every)
    loaders = [BatchLoader(d, batch_size=4, sequence_length=64, seed=0) for d in (here, there)]
    for _ in range(5):
        a, b = (loader.next_batch() for loader in loaders)
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.documents, b.documents)


def test_a_corrupt_shard_names_itself_and_its_url(s3: Any, url: str, tmp_path: Path) -> None:
    key = f"{tmp_path.name}/train-00001.tokens"
    content = bytearray(s3.get_object(Bucket="corpus", Key=key)["Body"].read())
    content[7] ^= 1
    s3.put_object(Bucket="corpus", Key=key, Body=bytes(content))
    shards = remote_shards(url, retry=Retry(attempts=2, sleep=lambda seconds: None))
    assert len(shards[0]) == SHARD_BYTES // 2
    with pytest.raises(ArtifactError, match=r"train-00001.tokens is corrupt") as caught:
        shards[1]
    assert f"{url}/train-00001.tokens" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(cached(tmp_path / "home")) == 1


def test_a_missing_shard_names_itself_and_its_url(s3: Any, url: str, tmp_path: Path) -> None:
    s3.delete_object(Bucket="corpus", Key=f"{tmp_path.name}/train-00002.tokens")
    waits: list[float] = []
    shards = remote_shards(url, retry=Retry(sleep=waits.append))
    with pytest.raises(ArtifactError, match=r"train-00002.tokens is missing") as caught:
        shards[2]
    assert f"{url}/train-00002.tokens" in str(caught.value)
    assert not waits  # waiting would not bring it back


def test_no_dataset_at_the_url(url: str, tiny_model: Path) -> None:
    with pytest.raises(ArtifactError, match=r"manifest.json is missing: there is no s3://.*/x/"):
        open_remote(f"{url}/x", retry=ONCE)
    upload_directory(tiny_model, f"{url}-model", last=MANIFEST)
    with pytest.raises(ArtifactError, match="is a model artifact, but a dataset is needed"):
        open_remote(f"{url}-model", retry=ONCE)


class _FailingProxy:
    """Forwards GET and HEAD to a server, or answers 503 as long as it is down."""

    def __init__(self, target: str) -> None:
        proxy = self
        self.down = False
        self.refused = 0
        host = target.removeprefix("http://")

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                if proxy.down:
                    proxy.refused += 1
                    self.send_response(503)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                connection = http.client.HTTPConnection(host)
                connection.request(self.command, self.path, headers=dict(self.headers))
                answer = connection.getresponse()
                body = answer.read()
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                        self.send_header(name, value)
                size = answer.getheader("Content-Length") or str(len(body))
                self.send_header("Content-Length", size)
                self.end_headers()
                self.wfile.write(body)
                connection.close()

            do_HEAD = do_GET  # noqa: N815

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self._thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()


def test_a_server_that_fails_twice_is_waited_for(
    url: str, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = _FailingProxy(os.environ["AWS_ENDPOINT_URL"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    _forget_connections()
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        proxy.down = len(waits) < 2

    try:
        shards = remote_shards(url, retry=Retry(sleep=sleep, jitter=random.Random(1)))
        proxy.down = True
        expected = TokenDataset.open(local, "train").tokens(0, SHARD_BYTES // 2)
        assert shards[0].tolist() == expected.tolist()
        assert proxy.refused >= 2
        assert [0.125 <= waits[0] <= 0.25, 0.25 <= waits[1] <= 0.5, len(waits)] == [True, True, 2]
        proxy.down = True
        shards._retry = Retry(attempts=2, sleep=lambda seconds: None)
        with pytest.raises(StorageError, match=r"can't read train-00001.tokens at s3://corpus/"):
            shards[1]
    finally:
        proxy.close()
        _forget_connections()


def test_the_cache_stays_within_its_bound_and_evicts_the_least_recent(
    url: str, tmp_path: Path
) -> None:
    cache = ShardCache(tmp_path / "small", most_bytes=3 * SHARD_BYTES + 10)
    shards = remote_shards(url, cache=cache)
    first = shards[0].tolist()

    def numbers() -> set[int]:
        return {n for n in range(9) if cache.path(shards._files[n][1]).exists()}

    for number in (1, 2):
        shards[number]
    os.utime(cache.path(shards._files[0][1]), (1, 1))  # long ago, whatever the clock's grain
    shards[0]  # used just now
    os.utime(cache.path(shards._files[1][1]), (2, 2))
    shards[3]
    assert numbers() == {0, 2, 3}
    for number in [*range(9), *range(9)]:
        shards[number]
        sizes = [path.stat().st_size for path in (tmp_path / "small").iterdir() if path.is_file()]
        assert sum(sizes) <= cache.most_bytes
    assert shards[0].tolist() == first  # fetched again
    tiny = ShardCache(tmp_path / "tiny", most_bytes=SHARD_BYTES - 1)
    with pytest.raises(StorageError, match=r"more than the shard cache's 1,999 .*CACHE_BYTES"):
        remote_shards(url, cache=tiny)[0]


def test_a_damaged_cached_shard_is_fetched_again(url: str, local: Path, tmp_path: Path) -> None:
    TokenDataset.open(url, "train").tokens(0, 10)
    (path,) = cached(tmp_path / "home")
    path.write_bytes(bytes(SHARD_BYTES))
    again = TokenDataset.open(url, "train").tokens(0, 50).tolist()
    assert again == TokenDataset.open(local, "train").tokens(0, 50).tolist()


def test_shards_come_ahead_of_time(url: str, tmp_path: Path) -> None:
    dataset = TokenDataset.open(url, "train")
    dataset.prefetch(np.array([0, 2500, 10**9]))
    last = (dataset.num_tokens - 1) // (SHARD_BYTES // 2)
    deadline = time.monotonic() + 60
    files = dataset.manifest.files
    wanted = {files[f"train-{number:05}.tokens"].sha256 for number in (0, 2, last)}
    directory = tmp_path / "home" / "cache" / "shards"
    while not (directory.exists() and {path.name for path in cached(tmp_path / "home")} >= wanted):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _read_all(place: str, environment: dict[str, str], seed: int, results: Any) -> None:
    os.environ.update(environment)
    dataset = TokenDataset.open(place, "train")
    order = np.random.default_rng(seed).permutation(dataset.num_documents)
    results.put(sum(int(dataset.document(int(i)).astype(np.int64).sum()) for i in order))


def test_processes_share_a_small_cache(url: str, local: Path, tmp_path: Path) -> None:
    environment = dict(os.environ) | {CACHE_BYTES_VARIABLE: str(3 * SHARD_BYTES)}
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=_read_all, args=(url, environment, seed, results))
        for seed in range(2)
    ]
    for process in processes:
        process.start()
    sums = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    here = TokenDataset.open(local, "train")
    assert sums == [int(here.tokens(0, here.num_tokens).astype(np.int64).sum())] * 2
    files = cached(tmp_path / "home")
    assert sum(path.stat().st_size for path in files) <= 3 * SHARD_BYTES
    assert not [path for path in files if path.suffix == ".part"]


def test_the_copy_of_the_small_files_is_verified(s3: Any, url: str, tmp_path: Path) -> None:
    key = f"{tmp_path.name}/train.offsets"
    s3.put_object(Bucket="corpus", Key=key, Body=b"other")
    with pytest.raises(ArtifactError, match=r"train.offsets is corrupt: the SHA-256 of s3://"):
        open_remote(url, retry=ONCE)
    assert not list((tmp_path / "home" / "cache" / "remote").iterdir())
