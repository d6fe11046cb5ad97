from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minigpt.core.artifact import Artifact, open_artifact
from minigpt.core.config import from_mapping
from minigpt.core.errors import ConfigError, DataError
from minigpt.data.chat_template import ChatTemplate
from minigpt.data.config import DataConfig
from minigpt.data.prepare import prepare
from minigpt.data.shards import SPLITS, TokenDataset
from minigpt.data.tokenizer import Tokenizer

TEMPLATE = """\
{% for message in messages %}{{ message.role + ': ' + message.content + '<|endoftext|>' }}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""


def conversations(count: int) -> list[dict[str, Any]]:
    rng = random.Random(0)
    records = []
    for number in range(count):
        messages = []
        for turn in range(rng.randint(1, 3)):
            messages.append({"role": "user", "content": f"question {number}.{turn}"})
            messages.append({"role": "assistant", "content": f"answer {rng.random()}"})
        records.append({"messages": messages})
    return records


def preferences(count: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"question {n}.0", "chosen": f"good {n}", "rejected": f"bad answer {n}"}
        for n in range(count)
    ]


def config(path: Path, kind: str, tmp_path: Path, **chat: Any) -> DataConfig:
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    tree = {
        "source": {"kind": kind, "paths": [str(path)]},
        "tokenizer": {"kind": "bytes"},
        "val_fraction": 0.2,
        "chat": {"template": str(tmp_path / "template.jinja"), **chat},
    }
    return from_mapping(DataConfig, tree)


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    text = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def made(
    tmp_path: Path, kind: str, records: list[dict[str, Any]], name: str = "data", **chat: Any
) -> Artifact:
    path = write_lines(tmp_path / f"{name}.jsonl.gz", records)
    return prepare(config(path, kind, tmp_path, **chat), tmp_path / name)


def counts(artifact: Artifact) -> dict[str, int]:
    found: dict[str, int] = artifact.manifest.metrics["cleaning"]["counts"]
    return found


def test_conversations_are_stored_with_their_targets(tmp_path: Path) -> None:
    records = conversations(40)
    artifact = made(tmp_path, "chat", [*records, records[3]])
    assert open_artifact(artifact.path).id == artifact.id
    assert counts(artifact) == {"read": 41, "kept": 40, "dropped_exact_duplicate": 1}
    tokenizer = Tokenizer.load(artifact.path / "tokenizer")
    assert tokenizer.chat_template == TEMPLATE  # travels to the model and to its server
    chat = ChatTemplate(tokenizer)
    expected = {
        (tuple(example.tokens), tuple(example.is_target))
        for record in records
        for example in chat.encode_turns(record["messages"])
    }
    stored = set()
    for split in SPLITS:
        dataset = TokenDataset.open(artifact.path, split)
        assert dataset.index.content == "chat" and dataset.num_documents > 0
        for i in range(dataset.num_documents):
            begin, end = dataset.offsets[i : i + 2].tolist()
            mask = dataset.target_mask(begin, end)
            assert mask is not None and 0 < mask.sum() < len(mask)
            stored.add((tuple(dataset.document(i).tolist()), tuple(mask.tolist())))
    assert stored == expected


def test_pairs_lie_side_by_side_and_share_their_prompt(tmp_path: Path) -> None:
    records = [*preferences(30), {"prompt": "q", "chosen": "same", "rejected": "same"}]
    artifact = made(tmp_path, "preference", records)
    assert counts(artifact)["dropped_equal_answers"] == 1
    dataset = TokenDataset.open(artifact.path, "train")
    assert dataset.index.content == "preference" and dataset.num_documents % 2 == 0
    tokenizer = Tokenizer.load(dataset.tokenizer_dir)
    for i in range(0, dataset.num_documents, 2):
        texts = []
        for document in (i, i + 1):
            begin, end = dataset.offsets[document : document + 2].tolist()
            mask = dataset.target_mask(begin, end)
            assert mask is not None
            texts.append(tokenizer.decode(dataset.document(document)[mask].tolist()))
        assert texts[0].startswith("good") and texts[1] == f"bad answer {texts[0][5:]}"


def test_a_prompt_is_in_the_same_split_of_both_kinds(tmp_path: Path) -> None:
    chats = [
        {"prompt": record["prompt"], "completion": record["chosen"]} for record in preferences(60)
    ]
    splits = []
    for kind, records in (("chat", chats), ("preference", preferences(60))):
        artifact = made(tmp_path, kind, records, name=kind)
        dataset = TokenDataset.open(artifact.path, "val")
        tokenizer = Tokenizer.load(dataset.tokenizer_dir)
        texts = (
            tokenizer.decode(dataset.document(i).tolist()) for i in range(dataset.num_documents)
        )
        splits.append({text.partition("\n")[0] for text in texts})
    assert splits[0] == splits[1] and splits[0]


def test_the_same_records_give_the_same_files_from_any_format(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet
    import zstandard

    records = conversations(25)
    first = made(tmp_path, "chat", records)
    lines = (tmp_path / "data.jsonl.gz", tmp_path / "z.jsonl.zst", tmp_path / "p.parquet")
    lines[1].write_bytes(zstandard.compress(gzip.decompress(lines[0].read_bytes())))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), lines[2])
    for path in lines[1:]:
        other = prepare(config(path, "chat", tmp_path), tmp_path / path.suffix[1:])
        assert other.manifest.files == first.manifest.files


@pytest.mark.parametrize("kind", ["chat", "preference"])
def test_what_is_too_long_is_dropped_truncated_or_refused_but_never_silently(
    tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    records = [*conversations(20)] if kind == "chat" else preferences(20)
    long = {"prompt": "question", "completion": "x" * 300, "chosen": "y" * 300, "rejected": "no"}
    records = [*records, long]
    limit = {"max_tokens": 260}
    dropped = made(tmp_path, kind, records, name="dropped", **limit)
    assert "longer than chat.max_tokens" in "".join(capfd.readouterr())
    assert counts(dropped)["dropped_too_long"] == 1
    cut = made(tmp_path, kind, records, name="cut", too_long="truncate", **limit)
    assert counts(cut)["truncated"] == 1
    lengths = [
        np.diff(TokenDataset.open(artifact.path, split).offsets)
        for artifact in (dropped, cut)
        for split in SPLITS
    ]
    assert max(map(max, lengths)) == 260
    documents = [a.manifest.metrics["documents"] for a in (dropped, cut)]
    assert documents[1] - documents[0] == (1 if kind == "chat" else 2)
    with pytest.raises(DataError, match=r"jsonl\.gz:21 has 3\d\d tokens, more than chat.max_tok"):
        made(tmp_path, kind, records, name="refused", too_long="refuse", **limit)
    assert not (tmp_path / "refused").exists()


def test_a_cut_that_leaves_no_target_drops_the_example(tmp_path: Path) -> None:
    records = [{"prompt": "q" * 200, "completion": "never seen"}, *conversations(5)]
    artifact = made(tmp_path, "chat", records, max_tokens=150, too_long="truncate")
    assert counts(artifact)["dropped_too_long"] == 1


def test_a_template_that_refuses_names_the_record(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", conversations(3))
    settings = config(path, "chat", tmp_path)
    (tmp_path / "template.jinja").write_text("{{ raise_exception('no such role') }}")
    with pytest.raises(DataError, match=r"data\.jsonl:1: .*no such role"):
        prepare(settings, tmp_path / "data")
    (tmp_path / "template.jinja").write_text("{% if %}")
    with pytest.raises(DataError, match="not valid: line 1"):
        prepare(settings, tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": {"kind": "train"}}, "takes the tokenizer of the model"),
        ({"clean": {"min_characters": 3}}, "clean is for texts"),
        ({"val_source": {"kind": "pystdlib"}}, "differ in what a document is"),
        ({"source": {"kind": "pystdlib"}, "chat": {"max_tokens": 9}}, "chat is for conversations"),
        ({"source": {"kind": "pydoc-chat", "paths": ["x"]}}, "must be empty for kind pydoc-chat"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    tree = {
        "source": {"kind": "chat", "paths": ["x.jsonl"]},
        "tokenizer": {"kind": "bytes"},
    }
    with pytest.raises(ConfigError, match=message):
        from_mapping(DataConfig, tree | changes)
