"""Records of conversations and preferences, from the forms that they are published in to one.

A conversation is `{"messages": [{"role", "content"}, ...]}`; a preference is `{"prompt": messages,
"chosen": text, "rejected": text}`. Whatever a record holds beside the known fields is metadata
and left alone; what would change its meaning (tool calls, pictures) is refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from minigpt.core.errors import DataError
from minigpt.core.storage import storage_errors
from minigpt.data.config import SourceConfig
from minigpt.data.files import find_files
from minigpt.data.pydoc_records import chat_records, preference_records
from minigpt.data.records import jsonl_records, parquet_records

Messages = list[dict[str, str]]

_IGNORED_MESSAGE_KEYS = {"role", "content", "name", "weight"}


def read_conversations(source: SourceConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each record's place and its conversation or preference.

    Raises:
        DataError: A record is malformed; named as file:line.
        StorageError: A file can't be read.
    """
    parse = _conversation if source.content == "chat" else _preference
    for where, record in _records(source):
        yield where, parse(record, where)


def _records(source: SourceConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    if source.kind == "pydoc-chat":
        yield from chat_records()
    elif source.kind == "pydoc-preference":
        yield from preference_records()
    else:
        for file in find_files(source):
            with storage_errors(f"read {file.path}"):
                if file.path.endswith(".parquet"):
                    yield from parquet_records(file)
                else:
                    yield from ((where, record) for where, record, _ in jsonl_records(file))


def _conversation(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    if record.get("messages") is not None:
        messages = _messages(record["messages"], f"{where}: messages")
    elif record.get("prompt") is not None and record.get("completion") is not None:
        messages = _prompt(record["prompt"], f"{where}: prompt")
        messages.append(_answer(record["completion"], f"{where}: completion"))
    else:
        raise DataError(
            f"{where} has neither messages nor prompt and completion, only {_names(record)}",
            remedy="rename its fields",
        )
    if messages[0]["role"] == "assistant":
        raise DataError(
            f"{where} begins with the assistant: nothing would lead to that answer",
            remedy="put a user's or system message before it",
        )
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{where} has no message of the assistant's to learn from")
    return {"messages": messages}


def _preference(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    for name in ("chosen", "rejected"):
        if record.get(name) is None:
            raise DataError(
                f"{where} has no field {name!r}, only {_names(record)}", remedy="rename its fields"
            )
    chosen, rejected = record["chosen"], record["rejected"]
    if record.get("prompt") is not None:
        prompt = _prompt(record["prompt"], f"{where}: prompt")
    else:
        prompt = _shared_prompt(chosen, rejected, where)
        chosen, rejected = chosen[-1:], rejected[-1:]
    return {
        "prompt": prompt,
        "chosen": _answer(chosen, f"{where}: chosen")["content"],
        "rejected": _answer(rejected, f"{where}: rejected")["content"],
    }


def _shared_prompt(chosen: Any, rejected: Any, where: str) -> Messages:
    """Return what two whole conversations have in common: all but their last message."""
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        raise DataError(f"{where} has no field 'prompt'", remedy="add it")
    prompt = _messages(chosen[:-1], f"{where}: chosen")
    if prompt != _messages(rejected[:-1], f"{where}: rejected"):
        raise DataError(f"{where}: chosen and rejected differ before their last message")
    return prompt


def _prompt(value: Any, where: str) -> Messages:
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    return _messages(value, where)


def _answer(value: Any, where: str) -> dict[str, str]:
    """Read one answer: a text, or a list of one message of the assistant's."""
    if isinstance(value, str):
        value = [{"role": "assistant", "content": value}]
    messages = _messages(value, where)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(f"{where} must be one message of the assistant's, not of: {roles}")
    return messages[0]


def _messages(value: Any, where: str) -> Messages:
    if not isinstance(value, list) or not value:
        raise DataError(f"{where} is no list of messages: {str(value)[:60]!r}")
    return [_message(each, f"{where}[{number}]") for number, each in enumerate(value)]


def _message(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise DataError(f"{where} is no message: {str(value)[:60]!r}")
    role, content = value.get("role"), value.get("content")
    if not isinstance(role, str) or not isinstance(content, str):
        raise DataError(f"{where}: role and content must be text, not {role!r}, {content!r:.60}")
    extra = [k for k, v in value.items() if k not in _IGNORED_MESSAGE_KEYS and v is not None]
    if extra:
        raise DataError(
            f"{where} has {', '.join(map(repr, extra))}, which no chat dataset here can hold",
            remedy="remove the field or the record",
        )
    if role == "assistant" and not content.strip():
        raise DataError(f"{where} is an empty answer", remedy="remove the record")
    return {"role": role, "content": content}


def _names(record: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, itertools.islice(record, 12))) or "none"
