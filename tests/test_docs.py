"""Every command that a page shows is one that exists, with options that exist."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from minigpt.cli.main import COMMANDS, _build, _called

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands(page: Path) -> Iterator[list[str]]:
    text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    inline = re.findall(r"`(minigpt [^`]+)`", text)
    for line in [*inline, *(line for block in blocks for line in block.splitlines())]:
        if re.match(r"(\$ )?minigpt +[a-z]", line) and "|" not in line and "..." not in line:
            yield shlex.split(line.removeprefix("$ "), comments=True)[1:]


def check(words: list[str]) -> None:
    name, *rest = words
    assert name in COMMANDS, words
    group: Any = typer.main.get_command(_build(name, tool=_called(words)[1]))
    command = group.commands[name]
    if hasattr(command, "commands"):
        if not rest:
            return
        assert rest[0] in command.commands, words
        command, rest = command.commands[rest[0]], rest[1:]
    known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    for word in rest:
        if word.startswith("--"):
            assert word.partition("=")[0] in known, words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_exist_with_their_options(page: Path) -> None:
    for words in commands(page):
        check(words)


def test_the_check_can_fail() -> None:
    with pytest.raises(AssertionError):
        check(["train", "recipe.yaml", "--run-dri", "x"])
    with pytest.raises(AssertionError):
        check(["artifact", "destroy"])


def test_the_pages_show_every_command_but_the_makefiles() -> None:
    shown = {words[0] for page in PAGES for words in commands(page)}
    assert shown >= set(COMMANDS) - {"quickstart"}
