"""`minigpt data` as a user meets it: real processes, exit codes, one-line errors."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest


def minigpt(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "minigpt", *arguments], capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    rng = random.Random(0)
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
    (tmp_path / "text").mkdir()
    for number in range(12):
        text = "\n".join(f"{' '.join(rng.choices(words, k=8))} {rng.random()}" for _ in range(20))
        (tmp_path / "text" / f"{number}.txt").write_text(text)
    path = tmp_path / "data.yaml"
    path.write_text(
        f"source:\n  paths: [{tmp_path}/text]\ntokenizer:\n  vocab_size: 300\nval_fraction: 0.2\n"
    )
    return path


def test_prepare_then_inspect(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = minigpt("data", "prepare", str(recipe), "--out", str(out), "--set", "seed=3", "--json")
    assert made.returncode == 0, made.stderr
    result = json.loads(made.stdout)
    assert result["uri"] == str(out)
    assert result["cleaning"]["counts"] == {"read": 12, "kept": 12}
    seen = minigpt("data", "inspect", str(out), "--samples", "2", "--json")
    inspected = json.loads(seen.stdout)
    assert inspected["id"] == result["id"]
    assert inspected["vocab_size"] == 300
    assert len(inspected["samples"]) == 2
    first = inspected["samples"][0]["text"]
    assert any(path.read_text().startswith(first) for path in (tmp_path / "text").iterdir())


def test_both_print_for_people(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "text" / "image").write_bytes(bytes(200))
    made = minigpt("data", "prepare", str(recipe), "--out", str(tmp_path / "out"))
    assert made.returncode == 0, made.stderr
    assert "vocabulary 300" in made.stdout
    assert f"dropped binary: 1\n      {tmp_path}/text/image" in made.stdout
    seen = minigpt("data", "inspect", str(tmp_path / "out"))
    assert "--- train document 0" in seen.stdout
    assert "documents read 13, kept 12" in seen.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--set", "source.path=x"], "unknown key 'source.path': did you mean 'paths'?"),
        (["--set", "source.paths=[/nowhere]"], "source.paths: no file at /nowhere"),
        (["--set", "clean.min_characters=99999"], "dropped_short 12"),
        (["--set", "tokenizer.vocab_size=12"], "tokenizer.vocab_size = 12: must be"),
        (["--set", "tokenizer.kind=file"], "tokenizer.path is required"),
        (["--set", "source.kind=jsonl", "--set", "source.suffixes=[.txt]"], "0.txt:1 is not valid"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    recipe: Path, tmp_path: Path, arguments: list[str], complaint: str
) -> None:
    result = minigpt("data", "prepare", str(recipe), "--out", str(tmp_path / "out"), *arguments)
    assert result.returncode == 2
    assert complaint in result.stderr
    assert result.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.yaml", "text"]


def test_inspect_names_the_damaged_file(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert minigpt("data", "prepare", str(recipe), "--out", str(out)).returncode == 0
    shard = out / "train-00000.tokens"
    content = bytearray(shard.read_bytes())
    content[10] ^= 1
    shard.write_bytes(content)
    result = minigpt("data", "inspect", str(out))
    assert result.returncode == 2
    assert "train-00000.tokens is corrupt" in result.stderr


@pytest.mark.soak
def test_prepare_on_ray_gives_the_same_files(recipe: Path, tmp_path: Path) -> None:
    """A cluster of its own, started and ended by the command."""
    files = []
    for where in ("local", "ray"):
        out = tmp_path / where
        made = minigpt("data", "prepare", str(recipe), "--out", str(out), "--on", where, "--json")
        assert made.returncode == 0, made.stderr
        assert json.loads(made.stdout)["documents"] == 12
        files.append(json.loads((out / "manifest.json").read_text())["files"])
    assert files[0] == files[1]


def test_conversations_are_prepared_and_their_mistakes_are_one_line(tmp_path: Path) -> None:
    records = [{"prompt": f"What is {n}?", "completion": f"A number: {n}."} for n in range(30)]
    path = tmp_path / "talk.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    prepare = ["data", "prepare", "--set", "source.kind=chat", "--set", f"source.paths=[{path}]"]
    bytes_ = ["--set", "tokenizer.kind=bytes"]
    made = minigpt(*prepare, *bytes_, "--out", str(tmp_path / "out"), "--json")
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["cleaning"]["counts"] == {"read": 30, "kept": 30}
    path.write_text('{"prompt": "no answer"}\n')
    refused = minigpt(*prepare, *bytes_, "--out", str(tmp_path / "other"))
    assert refused.returncode == 2
    assert "talk.jsonl:1 has neither messages" in refused.stderr
    assert refused.stderr.count("\n") == 1 and not (tmp_path / "other").exists()
    trained = minigpt(*prepare, "--out", str(tmp_path / "other"))
    assert "takes the tokenizer of the model" in trained.stderr
