"""`minigpt replay`: answer a logged request again, exactly."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minigpt.cli.evaluate import resolve_model
from minigpt.cli.output import JsonOption, emit
from minigpt.core.telemetry import configure_logging

if TYPE_CHECKING:
    from minigpt.serve.replay import Replayed

DIFFERS = 1

app = typer.Typer()


@app.command(
    epilog="Example: minigpt replay cmpl-0123456789abcdef --log replay.jsonl --model runs/a/model"
)
def replay(
    name: Annotated[
        str, typer.Argument(metavar="ID", help="The id of a response, such as cmpl-...")
    ],
    log: Annotated[Path, typer.Option(metavar="FILE", help="The server's replay_log.")],
    model: Annotated[
        str,
        typer.Option(
            help="What was served: a directory, an artifact's URL, or a name in the registry."
        ),
    ],
    adapter: Annotated[
        Path | None, typer.Option(help="The LoRA adapter that answered, where one did.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Answer a logged request again; exit code 0 where the answer is the same, else 1.

    Exit code 2 where something that the answer followed from is missing or another.
    """
    configure_logging(json=json, level="warning")
    from minigpt.serve.replay import find_answers
    from minigpt.serve.replay import replay as run

    answers, notes = run(find_answers(log, name), resolve_model(model), adapter)
    identical = all(answer.identical for answer in answers)
    result = {
        "identical": identical,
        "notes": notes,
        "answers": [dataclasses.asdict(answer) for answer in answers],
    }
    emit(result, json=json, human=lambda: _print(answers, notes))
    if not identical:
        raise typer.Exit(DIFFERS)


def _print(answers: list[Replayed], notes: list[str]) -> None:
    for note in notes:
        typer.echo(f"note: {note}")
    for answer in answers:
        verdict = "identical" if answer.identical else f"differs: {answer.difference}"
        typer.echo(f"{answer.id} answer {answer.index}: {verdict}\n{answer.text}")
