"""What all commands share: their common options, results for people or machines, config help."""

from __future__ import annotations

import json as json_module
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from minigpt.core.config import Config, field_help

JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a config value; may repeat."),
]


def emit(result: Mapping[str, Any], *, json: bool, human: Callable[[], None]) -> None:
    """Print a command's result: one JSON object on stdout, or whatever `human` prints."""
    if json:
        typer.echo(json_module.dumps(result, default=_plain, sort_keys=False))
    else:
        human()


def config_epilog(cls: type[Config], *, example: str = "") -> str:
    r"""Render a config class as help text: an example, then each key, type, default, meaning.

    Use as `@app.command(epilog=config_epilog(TrainConfig, example="minigpt train ..."))`.
    Paragraphs are separated by blank lines, which Typer keeps apart.
    """
    lines = [f"Example: {example}"] if example else []
    lines += ["Config keys (YAML or --set):"]
    for key, kind, default, meaning in field_help(cls):
        text = " ".join(meaning.split())
        lines.append(f"{key} ({kind}, default {default}): {text}")
    return "\n\n".join(line.replace("[", r"\[") for line in lines)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Config):
        return value.model_dump(mode="json")
    if hasattr(value, "isoformat"):
        return value.isoformat()
    raise TypeError(f"can't render {type(value).__name__} as JSON")
