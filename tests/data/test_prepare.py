from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from minigpt.core.artifact import Artifact, lineage, open_artifact
from minigpt.core.config import from_mapping, to_yaml
from minigpt.core.errors import ArtifactError, DataError
from minigpt.data.clean import text_digest
from minigpt.data.config import DataConfig
from minigpt.data.prepare import prepare
from minigpt.data.shards import SPLITS, TokenDataset
from minigpt.data.tokenizer import Tokenizer
from minigpt.data.tokenizer_build import EOS

WORDS = [f"{a}{b}" for a in ("riv", "gard", "wint", "stor", "hum") for b in ("er", "en", "ly", "s")]


def sentences(rng: random.Random, count: int = 20) -> str:
    """Return text whose every line and 5-gram is new."""
    return "".join(f"{' '.join(rng.choices(WORDS, k=9))} {rng.random()}\n" for _ in range(count))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    rng = random.Random(0)
    directory = tmp_path / "corpus"
    directory.mkdir()
    for number in range(40):
        (directory / f"{number:02}.txt").write_text(sentences(rng))
    return directory


def config(path: Path, *, kind: str = "text", **changes: Any) -> DataConfig:
    source = {"kind": kind, "paths": [str(path)]}
    tree = {"source": source, "tokenizer": {"kind": "bytes"}, **changes}
    return from_mapping(DataConfig, tree)


def documents(artifact: Artifact | Path, split: str) -> list[str]:
    path = artifact if isinstance(artifact, Path) else artifact.path
    dataset = TokenDataset.open(path, "train" if split == "train" else "val")
    tokenizer = Tokenizer.load(dataset.tokenizer_dir)
    return [tokenizer.decode(dataset.document(i).tolist()) for i in range(dataset.num_documents)]


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }


def run_in_process(
    configuration: DataConfig, out: Path, *, before: str = "", **environment: str
) -> subprocess.Popen[str]:
    """Prepare in a new process, having run the statements `before`."""
    code = (
        "import sys, yaml\n"
        "from minigpt.core.config import from_mapping\n"
        "from minigpt.core.errors import MinigptError\n"
        "from minigpt.data.config import DataConfig\n"
        "from minigpt.data.prepare import prepare\n"
        f"{before}\n"
        "try:\n"
        f"    prepare(from_mapping(DataConfig, yaml.safe_load(sys.stdin)), {str(out)!r})\n"
        "except MinigptError as error:\n"
        "    sys.exit(f'{type(error).__name__}: {error}')\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    assert process.stdin is not None
    process.stdin.write(to_yaml(configuration))
    process.stdin.close()
    process.stdin = None
    return process


def test_every_document_is_stored_whole_and_once(corpus: Path, tmp_path: Path) -> None:
    artifact = prepare(config(corpus, val_fraction=0.2), tmp_path / "out")
    expected = sorted(path.read_text() for path in corpus.iterdir())
    train, val = documents(artifact, "train"), documents(artifact, "val")
    assert sorted(train + val) == expected
    assert 2 <= len(val) <= 16
    metrics = artifact.manifest.metrics
    assert metrics["cleaning"]["counts"] == {"read": 40, "kept": 40}
    assert metrics["documents"] == 40
    assert metrics["bytes"] == sum(len(text) for text in expected)
    assert metrics["splits"]["val"]["documents"] == len(val)
    assert metrics["tokens"] == metrics["bytes"] + 40
    dataset = TokenDataset.open(artifact.path, "train")
    assert all(dataset.document(i)[0] == 256 for i in range(dataset.num_documents))


def test_the_tokenizer_is_the_parent_and_lies_inside(corpus: Path, tmp_path: Path) -> None:
    artifact = prepare(config(corpus), tmp_path / "out")
    (tokenizer,) = lineage(artifact).ancestors
    assert tokenizer.artifact is not None
    assert tokenizer.artifact.manifest.kind == "tokenizer"
    assert tokenizer.artifact.path == tmp_path / "out-tokenizer"
    assert contents(tokenizer.artifact.path) == contents(artifact.path / "tokenizer")


def test_the_same_text_and_config_give_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    wanted = config(corpus, tokenizer={"vocab_size": 400}, shard_tokens=5000)
    here = prepare(wanted, tmp_path / "here")
    for seed in ("1", "2"):
        out = tmp_path / f"there{seed}"
        process = run_in_process(wanted, out, PYTHONHASHSEED=seed, RAYON_NUM_THREADS=seed)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert contents(out) == contents(here.path)
    assert len(list(here.path.glob("train-*.tokens"))) > 1


def test_duplicates_are_dropped_counted_and_never_cross(corpus: Path, tmp_path: Path) -> None:
    originals = [path.read_text() for path in sorted(corpus.iterdir())]
    for number, text in enumerate(originals):
        (corpus / f"z{number:02}-spaced.txt").write_text(text.replace(" ", "  "))
        (corpus / f"z{number:02}-edited.txt").write_text(text + "one more line at the end\n")
    artifact = prepare(config(corpus, val_fraction=0.5), tmp_path / "out")
    counts = artifact.manifest.metrics["cleaning"]["counts"]
    assert counts["read"] == 120
    assert counts["dropped_exact_duplicate"] == 40
    assert counts["dropped_near_duplicate"] == 40
    train, val = documents(artifact, "train"), documents(artifact, "val")
    assert sorted(train + val) == sorted(originals)
    assert not {text_digest(text) for text in train} & {text_digest(text) for text in val}


def test_a_document_stays_in_its_split_whatever_else_there_is(corpus: Path, tmp_path: Path) -> None:
    wanted = config(corpus, val_fraction=0.3)
    before = documents(prepare(wanted, tmp_path / "before"), "val")
    rng = random.Random(1)
    for number in range(20):
        (corpus / f"new{number}.txt").write_text(sentences(rng))
    after = documents(prepare(wanted, tmp_path / "after"), "val")
    assert set(before) <= set(after)
    other = prepare(wanted.replace(seed=1), tmp_path / "other")
    assert set(documents(other, "val")) != set(after)


def test_a_validation_source_wins_over_training(corpus: Path, tmp_path: Path) -> None:
    held_out = tmp_path / "held-out"
    held_out.mkdir()
    copied = (corpus / "07.txt").read_text()
    (held_out / "a.txt").write_text(copied)
    (held_out / "b.txt").write_text(sentences(random.Random(5)))
    wanted = config(corpus, val_source={"paths": [str(held_out)]})
    artifact = prepare(wanted, tmp_path / "out")
    assert len(documents(artifact, "val")) == 2
    train = documents(artifact, "train")
    assert len(train) == 39
    assert copied not in train
    with pytest.raises(DataError, match="no document of source is left"):
        prepare(wanted.replace(source={"paths": [f"{corpus}/07.txt"]}), tmp_path / "none")


def test_max_bytes_stops_reading(corpus: Path, tmp_path: Path) -> None:
    artifact = prepare(config(corpus, max_bytes=3000), tmp_path / "out")
    assert 3000 <= artifact.manifest.metrics["bytes"] < 6000


def test_files_that_are_not_utf8_are_counted_and_named(corpus: Path, tmp_path: Path) -> None:
    latin = ("caf\xe9 na\xefve " + sentences(random.Random(3))).encode("latin-1")
    (corpus / "latin.txt").write_bytes(latin)
    (corpus / "image.bin").write_bytes(bytes(range(256)) * 10)
    artifact = prepare(config(corpus), tmp_path / "out")
    cleaning = artifact.manifest.metrics["cleaning"]
    assert cleaning["counts"]["decoded_windows-1252"] == 1
    assert cleaning["counts"]["dropped_binary"] == 1
    assert cleaning["examples"]["dropped_binary"] == [str(corpus / "image.bin")]
    texts = documents(artifact, "train") + documents(artifact, "val")
    assert latin.decode("latin-1") in texts


def test_special_tokens_in_documents_stay_text(corpus: Path, tmp_path: Path) -> None:
    trap = f"before {EOS} after " + sentences(random.Random(4))
    (corpus / "trap.txt").write_text(trap)
    artifact = prepare(config(corpus, tokenizer={"vocab_size": 300}), tmp_path / "out")
    assert trap in documents(artifact, "train") + documents(artifact, "val")
    for split in SPLITS:
        dataset = TokenDataset.open(artifact.path, split)
        stream = dataset.tokens(0, dataset.num_tokens)
        assert (stream == dataset.index.eos_token_id).sum() == dataset.num_documents


@pytest.mark.parametrize(
    ("text", "changes", "complaint"),
    [
        ("short", {}, r"the corpus is empty: of 1 documents none is left \(dropped_short 1\)"),
        ("a line that is all there is\n" * 4, {}, r"dropped_repeated_lines 1"),
        (sentences(random.Random(6)), {}, "one document can't be split"),
    ],
)
def test_a_corpus_that_is_too_small_is_refused_and_leaves_nothing(
    tmp_path: Path, text: str, changes: dict[str, Any], complaint: str
) -> None:
    source = tmp_path / "only.txt"
    source.write_text(text)
    with pytest.raises(DataError, match=complaint) as caught:
        prepare(config(source, **changes), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["only.txt"]


def test_one_document_trains_without_validation(tmp_path: Path) -> None:
    source = tmp_path / "only.txt"
    source.write_text(sentences(random.Random(6)))
    artifact = prepare(config(source, val_fraction=0), tmp_path / "out")
    assert (len(documents(artifact, "train")), len(documents(artifact, "val"))) == (1, 0)


def test_two_documents_fill_both_splits(tmp_path: Path) -> None:
    source = tmp_path / "two.txt"
    rng = random.Random(6)
    source.write_text(sentences(rng) + "\n\n" + sentences(rng))
    for fraction in (0.001, 0.999):
        wanted = config(source, val_fraction=fraction)
        wanted = wanted.replace(source=wanted.source.replace(separator="\n\n\n"))
        artifact = prepare(wanted, tmp_path / f"out{fraction}")
        assert [len(documents(artifact, split)) for split in SPLITS] == [1, 1]


def test_existing_tokenizers_are_used_and_kept_as_origin(corpus: Path, tmp_path: Path) -> None:
    first = prepare(config(corpus, tokenizer={"vocab_size": 350}), tmp_path / "first")
    again = {"kind": "file", "path": str(tmp_path / "first-tokenizer")}
    second = prepare(config(corpus, tokenizer=again), tmp_path / "second")
    assert contents(second.path) == contents(first.path)
    (tokenizer,) = lineage(second).ancestors
    assert tokenizer.ancestors[0].parent.uri == str(tmp_path / "first-tokenizer")


def test_nothing_is_overwritten(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ArtifactError, match="out exists, and artifacts are never changed"):
        prepare(config(corpus), tmp_path / "out")
    prepare(config(corpus), tmp_path / "other")
    (tmp_path / "other").rename(tmp_path / "moved")
    trained = config(corpus, tokenizer={"vocab_size": 300})
    with pytest.raises(ArtifactError, match="other-tokenizer exists and was made with another"):
        prepare(trained, tmp_path / "other")


def test_a_tokenizer_left_by_a_killed_run_is_used_if_it_is_the_same(
    corpus: Path, tmp_path: Path
) -> None:
    wanted = config(corpus, tokenizer={"vocab_size": 300})
    prepare(wanted, tmp_path / "out").path.rename(tmp_path / "moved")
    before = open_artifact(tmp_path / "out-tokenizer").id
    prepare(wanted, tmp_path / "out")
    assert open_artifact(tmp_path / "out-tokenizer").id == before
    (tmp_path / "out").rename(tmp_path / "moved2")
    (corpus / "more.txt").write_text("different words altogether " + sentences(random.Random(9)))
    for path in corpus.glob("0*"):
        path.unlink()
    with pytest.raises(ArtifactError, match="out-tokenizer exists and holds another tokenizer"):
        prepare(wanted, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_one_line_and_leaves_nothing(corpus: Path, tmp_path: Path) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"
    process = run_in_process(config(corpus), tmp_path / "disk" / "out", before=limit)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.startswith("StorageError: can't write")
    assert errors.count("\n") == 1
    assert list((tmp_path / "disk").iterdir()) == []


@pytest.mark.parametrize("delay", [0.3, 0.5, 0.7])
def test_a_killed_run_can_be_repeated(tmp_path: Path, delay: float) -> None:
    rng = random.Random(8)
    lines = [json.dumps({"text": sentences(rng)}) for _ in range(3000)]
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    wanted = config(tmp_path / "c.jsonl", kind="jsonl", clean={"near_duplicates": None})
    out = tmp_path / "out"
    process = run_in_process(wanted, out)
    while not list(tmp_path.glob(".out.*.tmp")):
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    if not out.exists():
        prepare(wanted, out)
    open_artifact(out, kind="dataset", verify=True)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["c.jsonl", "out", "out-tokenizer"]


@pytest.mark.parametrize(
    ("tokenizer", "complaint"),
    [
        ({"kind": "file", "path": "/nowhere"}, "no tokenizer at /nowhere"),
        ({"kind": "train", "pattern": "("}, "is no pattern"),
    ],
)
def test_a_tokenizers_mistakes_show_before_any_text_is_read(
    tmp_path: Path, tokenizer: dict[str, str], complaint: str
) -> None:
    with pytest.raises(DataError, match=complaint):
        prepare(config(tmp_path / "never-looked-at", tokenizer=tokenizer), tmp_path / "out")


def test_the_documented_config_is_valid() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert blocks
    for block in blocks:
        from_mapping(DataConfig, yaml.safe_load(block))


def test_a_remote_destination(corpus: Path) -> None:
    prepare(config(corpus), "memory://datasets/corpus")
    found = open_artifact("memory://datasets/corpus", kind="dataset")
    assert len(documents(found, "train")) + len(documents(found, "val")) == 40
    open_artifact("memory://datasets/corpus-tokenizer", kind="tokenizer")


def test_a_large_corpus_trains_its_tokenizer_on_a_sample(corpus: Path, tmp_path: Path) -> None:
    sampled = {"vocab_size": 600, "train_bytes": 5000}
    few = prepare(config(corpus, tokenizer=sampled), tmp_path / "few")
    whole = prepare(config(corpus, tokenizer={"vocab_size": 600}), tmp_path / "whole")
    assert contents(few.path / "tokenizer") != contents(whole.path / "tokenizer")


@pytest.mark.soak
def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    report = "import atexit, resource, sys\natexit.register(lambda: print('peak', "
    report += "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr))"
    peaks = []
    for size in (500, 2500):
        path = tmp_path / f"{size}.jsonl"
        rng = random.Random(size)
        with path.open("w") as file:
            file.writelines(json.dumps({"text": sentences(rng, 260)}) + "\n" for _ in range(size))
        out = tmp_path / str(size)
        process = run_in_process(config(path, kind="jsonl"), out, before=report)
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        peaks.append(int(errors.split("peak ")[1]) / 1024)
    assert peaks[1] - peaks[0] < 30, peaks  # MB, for 40 MB more text in 2000 more documents
