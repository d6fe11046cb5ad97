"""Preparing on a real local Ray cluster: the same bytes as here."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minigpt.core.config import from_mapping
from minigpt.core.errors import DataError
from minigpt.data.config import DataConfig
from minigpt.data.prepare import prepare
from minigpt.data.ray_prepare import RayWork

WORDS = [f"{a}{b}" for a in ("riv", "gard", "wint", "stor", "hum") for b in ("er", "en", "ly", "s")]


def text(rng: random.Random, lines: int = 12) -> str:
    return "".join(f"{' '.join(rng.choices(WORDS, k=9))} {rng.random()}\n" for _ in range(lines))


@pytest.fixture(scope="module")
def work() -> Iterator[RayWork]:
    import ray

    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        with RayWork.connect() as connected:
            yield connected
        assert ray.is_initialized()  # it was not ours to stop
    finally:
        ray.shutdown()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files with duplicates across them, mojibake, Latin-1, binaries and scraps."""
    directory = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    texts = [text(rng) for _ in range(60)]
    for number, content in enumerate(texts):
        (directory / f"{number:02}.txt").write_text(content)
        if number % 5 == 0:
            (directory / f"{number:02}-again.txt").write_text(content.replace(" ", "  "))
        if number % 7 == 0:
            (directory / f"{number:02}-near.txt").write_text(content + "one line more\n")
    (directory / "latin.txt").write_bytes(("caf\xe9 " + text(rng)).encode("latin-1"))
    (directory / "mojibake.txt").write_text("CafÃ© " + text(rng))
    (directory / "zeros.bin").write_bytes(bytes(300))
    (directory / "short.txt").write_text("x")
    (directory / "empty.txt").write_text("")
    return directory


def config(path: Path, kind: str = "text", **changes: Any) -> DataConfig:
    tree = {"source": {"kind": kind, "paths": [str(path)]}, "tokenizer": {"vocab_size": 320}}
    return from_mapping(DataConfig, tree | {"shard_tokens": 3000, "val_fraction": 0.2} | changes)


@pytest.mark.parametrize(
    "changes",
    [{}, {"clean": {"near_duplicates": None}, "max_bytes": 9000, "tokenizer": {"kind": "bytes"}}],
)
def test_text_gives_the_same_bytes(
    work: RayWork, corpus: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    wanted = config(corpus, **changes)
    here = prepare(wanted, tmp_path / "here")
    there = prepare(wanted, tmp_path / "there", work)
    assert there.manifest.files == here.manifest.files
    for name in ("cleaning", "text_sha256", "splits"):
        assert there.manifest.metrics[name] == here.manifest.metrics[name]
    assert len([name for name in here.manifest.files if name.startswith("train-")]) > 1
    if not changes:
        counts = here.manifest.metrics["cleaning"]["counts"]
        assert counts["dropped_exact_duplicate"] == 12
        assert counts["dropped_near_duplicate"] == 9
        assert counts["dropped_binary"] == 1


def test_records_and_a_validation_source_give_the_same_bytes(
    work: RayWork, corpus: Path, tmp_path: Path
) -> None:
    rng = random.Random(3)
    (tmp_path / "raw").mkdir()
    for number in range(4):
        lines = [json.dumps({"text": text(rng)}) for _ in range(30)]
        data = ("\n".join(lines) + "\n").encode()
        (tmp_path / "raw" / f"{number}.jsonl.gz").write_bytes(gzip.compress(data))
    wanted = config(
        tmp_path / "raw",
        "jsonl",
        val_source={"paths": [f"{corpus}/0*.txt"]},
    )
    here = prepare(wanted, tmp_path / "here")
    there = prepare(wanted, tmp_path / "there", work)
    assert there.manifest.files == here.manifest.files


def test_a_malformed_file_is_named_as_it_is_here(work: RayWork, tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    rng = random.Random(3)
    good = json.dumps({"text": text(rng)})
    (tmp_path / "raw" / "a.jsonl").write_text(f"{good}\n{good[:-5]}\n")
    (tmp_path / "raw" / "b.jsonl").write_text(f"{good}\n")
    wanted = config(tmp_path / "raw", "jsonl")
    messages = []
    for which in (None, work):
        with pytest.raises(DataError, match=r"a.jsonl:2 is not valid JSON") as caught:
            prepare(wanted, tmp_path / "out", which)
        messages.append(str(caught.value))
        assert not (tmp_path / "out").exists()
    assert messages[0] == messages[1]
