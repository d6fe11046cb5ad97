"""`minigpt chat`: a conversation with a served model, through the public API like any client."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minigpt.cli.output import JsonOption, emit
from minigpt.core.errors import MinigptError

if TYPE_CHECKING:
    from openai import OpenAI

app = typer.Typer()


@app.command(epilog='Example: minigpt chat "def fibonacci(n):" --max-tokens 64')
def chat(
    message: Annotated[
        str | None, typer.Argument(help="Say this and exit; without it, converse.")
    ] = None,
    url: Annotated[str, typer.Option(help="The server.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Which model; default: the first.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message to start with.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens an answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 is greedy.")] = 0.7,
    json: JsonOption = False,
) -> None:
    """Talk to a served model; an empty line or Ctrl-D ends the conversation."""
    client, name = _connect(url, model)
    history: list[dict[str, str]] = []
    if system:
        history.append({"role": "system", "content": system})
    options = {"model": name, "max_tokens": max_tokens, "temperature": temperature}
    for line in [message] if message is not None else _lines():
        history.append({"role": "user", "content": line})
        pieces = []
        for piece in _answer(client, history, options):
            pieces.append(piece)
            if not json:
                typer.echo(piece, nl=False)
        answer = "".join(pieces)
        history.append({"role": "assistant", "content": answer})
        emit({"model": name, "message": line, "answer": answer}, json=json, human=typer.echo)


def _connect(url: str, model: str | None) -> tuple[OpenAI, str]:
    from openai import APIConnectionError, OpenAI

    client = OpenAI(base_url=f"{url.rstrip('/')}/v1", api_key="none")
    try:
        names = [entry.id for entry in client.models.list()]
    except APIConnectionError:
        raise MinigptError(
            f"no server answers at {url}", remedy="start one with: minigpt serve champion"
        ) from None
    if model is not None and model not in names:
        raise MinigptError(f"the server has no model {model!r}", remedy=f"it has {names}")
    return client, model or names[0]


def _answer(
    client: OpenAI, history: list[dict[str, str]], options: dict[str, Any]
) -> Iterator[str]:
    """Stream one answer's text.

    Raises:
        MinigptError: The server refused the request or went away.
    """
    from openai import APIError

    messages: Any = history
    try:
        stream = client.chat.completions.create(messages=messages, stream=True, **options)
        for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                yield chunk.choices[0].delta.content
    except APIError as error:
        raise MinigptError(f"the server answered: {error.message}") from None


def _lines() -> Iterable[str]:
    """Read messages from the terminal, or from a pipe without prompting."""
    interactive = sys.stdin.isatty()
    while True:
        if interactive:
            typer.echo("> ", nl=False, err=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line
