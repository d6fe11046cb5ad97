from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from minigpt.core.errors import DataError
from minigpt.data.config import SourceConfig
from minigpt.data.conversations import read_conversations
from minigpt.data.pydoc_records import chat_records, preference_records

USER = {"role": "user", "content": "Q"}
YES = {"role": "assistant", "content": "yes"}
NO = {"role": "assistant", "content": "no"}


def read(tmp_path: Path, kind: str, *records: Any) -> list[dict[str, Any]]:
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    source = SourceConfig.model_validate({"kind": kind, "paths": [str(path)]})
    return [content for _, content in read_conversations(source)]


def test_the_published_forms_of_a_conversation(tmp_path: Path) -> None:
    (first, second, third) = read(
        tmp_path,
        "chat",
        {"messages": [USER | {"name": "ann", "tool_calls": None}, YES], "id": 7},
        {"prompt": "Q", "completion": "yes"},
        {"prompt": [USER], "completion": [YES]},
    )
    assert first == second == third == {"messages": [USER, YES]}


def test_the_published_forms_of_a_preference(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        "preference",
        {"prompt": "Q", "chosen": "yes", "rejected": "no", "score": 1},
        {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
        {"chosen": [USER, YES], "rejected": [USER, NO]},
    )
    assert found == [{"prompt": [USER], "chosen": "yes", "rejected": "no"}] * 3


@pytest.mark.parametrize(
    ("kind", "record", "message"),
    [
        ("chat", {"text": "x"}, "neither messages nor prompt and completion, only 'text'"),
        ("chat", {"messages": []}, "no list of messages"),
        ("chat", {"messages": ["hi"]}, "no message: 'hi'"),
        ("chat", {"messages": [YES]}, "begins with the assistant"),
        ("chat", {"messages": [USER]}, "no message of the assistant's"),
        ("chat", {"messages": [USER, YES | {"content": [{"type": "text"}]}]}, "must be text"),
        ("chat", {"messages": [USER, YES | {"tool_calls": [1]}]}, "'tool_calls', which no chat"),
        ("chat", {"prompt": "Q", "completion": "  "}, "an empty answer"),
        ("preference", {"prompt": "Q", "chosen": "yes"}, "no field 'rejected'"),
        ("preference", {"chosen": "yes", "rejected": "no"}, "no field 'prompt'"),
        ("preference", {"prompt": "Q", "chosen": [YES, USER], "rejected": "no"}, "must be one"),
        (
            "preference",
            {"chosen": [USER, YES], "rejected": [USER | {"content": "other"}, NO]},
            "differ before their last message",
        ),
    ],
)
def test_a_record_that_can_not_be_used_is_named_by_line(
    tmp_path: Path, kind: str, record: Any, message: str
) -> None:
    good = {"prompt": "Q", "completion": "a", "chosen": "a", "rejected": "b"}
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path, kind, good, record)
    assert "records.jsonl:2" in str(caught.value)


def test_the_standard_library_tells_what_its_functions_do() -> None:
    preferences = list(preference_records())
    assert len(preferences) > 1000
    records = [record for _, record in preferences]
    assert all(record["prompt"].startswith("def ") for record in records)
    assert all(record["chosen"].endswith(".") for record in records)
    assert sum(r["chosen"] == r["rejected"] for r in records) < 0.05 * len(records)
    words = [[sorted(r[name][:-1].split()) for name in ("chosen", "rejected")] for r in records]
    assert all(chosen == rejected for chosen, rejected in words)
    for (where, chat), (same, record) in zip(islice(chat_records(), 50), preferences, strict=False):
        assert where == same
        assert chat == {"prompt": record["prompt"], "completion": record["chosen"]}
