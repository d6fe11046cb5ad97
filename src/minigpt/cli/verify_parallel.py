"""`minigpt train verify-parallel`: prove a recipe's mesh against one process."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minigpt.cli.output import JsonOption, SetOption, emit

if TYPE_CHECKING:
    from minigpt.train.verify_parallel import Verdict

app = typer.Typer()


@app.command("verify-parallel")
def verify_parallel(
    recipe: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="A recipe with the mesh to prove.")
    ],
    overrides: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Compare the recipe's mesh with one process, on the CPU and a tiny copy of the model.

    Starts as many processes as the mesh has. Exits with 1 where a gradient differs.
    """
    from minigpt.core.config import load_config
    from minigpt.train.config import TrainConfig
    from minigpt.train.mesh import describe
    from minigpt.train.verify_parallel import family, verify_parallel

    config = load_config(TrainConfig, recipe, overrides or [])
    verdict = verify_parallel(config.mesh, family(config))
    result = {"mesh": describe(config.mesh), "ok": verdict.ok, **asdict(verdict)}
    emit(result, json=json, human=lambda: _print(describe(config.mesh), verdict))
    if not verdict.ok:
        raise typer.Exit(1)


def _print(mesh: str, verdict: Verdict) -> None:
    from minigpt.train.verify_parallel import ACCUMULATIONS, TOLERANCE

    heads = "".join(f"{f'error, accum. {count}':>18}" for count in ACCUMULATIONS)
    typer.echo(f"{'gradient of':<48}{'layout':<24}{'largest':>10}{heads}")
    for row in verdict.comparisons:
        errors = "".join(f"{error:>18.1e}" for error in row.errors)
        mark = "" if row.ok else "  DIFFERS"
        typer.echo(f"{row.name:<48}{row.layout:<24}{row.magnitude:>10.1e}{errors}{mark}")
    for name in verdict.unequal_replicas:
        typer.echo(f"{name}: ranks that should hold the same do not")
    for name in verdict.equal_shards:
        typer.echo(f"{name}: tensor parallel ranks hold the same shard")
    conclusion = "computes what one process does" if verdict.ok else "does NOT compute the same"
    typer.echo(f"\nmesh {mesh}: {conclusion}, to {TOLERANCE:g} in float64")
