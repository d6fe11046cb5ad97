"""Conversations on every machine: the standard library's functions and what their docs say.

A record's prompt is a function's signature and its answer the first line of its docstring. Real
text by many authors, enough for a first fine-tuning, with nothing to download. For preferences
the rejected answer has the same words in another order: a preference that a tiny model can learn.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

from minigpt.core.storage import storage_errors
from minigpt.data.config import SourceConfig
from minigpt.data.files import find_files

_SHORTEST, _LONGEST = 12, 80
_NOT_DOCUMENTED = ("/test/", "/tests/", "/idlelib/", "/lib2to3/")
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Summary(NamedTuple):
    """A function and what it does."""

    where: str
    signature: str
    text: str


def chat_records() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a place and {prompt, completion} for each function."""
    for found in summaries():
        yield found.where, {"prompt": found.signature, "completion": found.text}


def preference_records() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a place and {prompt, chosen, rejected} for each function."""
    for found in summaries():
        words = found.text.removesuffix(".").split()
        random.Random(found.text).shuffle(words)
        rejected = " ".join(words) + "."
        record = {"prompt": found.signature, "chosen": found.text, "rejected": rejected}
        yield found.where, record


def summaries() -> Iterator[Summary]:
    """Yield the functions of the running Python's library that have a one-line summary.

    Raises:
        DataError: The sources are not installed.
        StorageError: One can't be read.
    """
    for file in find_files(SourceConfig(kind="pystdlib")):
        if any(part in file.path for part in _NOT_DOCUMENTED):
            continue
        with storage_errors(f"read {file.path}"), file.filesystem.open(file.path, "rb") as raw:
            source = raw.read()
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):  # the library keeps examples of broken source
            continue
        yield from _in_body(tree, file.path, "")


def _in_body(node: ast.AST, path: str, owner: str) -> Iterator[Summary]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from _in_body(child, path, f"{owner}{child.name}.")
        elif isinstance(child, _FUNCTIONS):
            lines = (ast.get_docstring(child) or "").splitlines()
            text = lines[0].strip() if lines else ""
            if _SHORTEST <= len(text) <= _LONGEST and text.endswith("."):
                signature = f"def {owner}{child.name}({ast.unparse(child.args)})"
                yield Summary(f"{path}:{child.lineno}", signature, text)
