"""`minigpt chaos`: inject faults into real runs and certify that the result is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from minigpt.cli.output import JsonOption, SetOption, emit

app = typer.Typer()

DEFAULT_FAULTS = "kill,kill-reduce,kill-save,stop,nan,bitflip"


@app.callback()
def chaos() -> None:
    """Inject faults and certify that they changed nothing."""


@app.command()
def train(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="A YAML file of a small training run.")
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="The report; the runs go to DIR-runs.")
    ],
    ranks: Annotated[int, typer.Option(min=1, help="Data parallel ranks of the runs.")] = 2,
    faults: Annotated[
        str, typer.Option(help="Faults, separated by commas; `all` is every one.")
    ] = DEFAULT_FAULTS,
    overrides: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Train a small run unbroken and under faults, and compare every loss and the weights.

    Faults: kill, kill-forward, kill-reduce, kill-save, kill-validate (kill -9 there), term
    (SIGTERM), stop (SIGSTOP), hang, slow, nan, diverge (a bit of a replica's weights), bitflip
    (a bit of a checkpoint), disk (full, needs root), tracker (lost). Exits with 1 where a run
    did not end with the unbroken run's bits.
    """
    from minigpt.core.artifact import is_artifact
    from minigpt.core.errors import ConfigError
    from minigpt.core.telemetry import configure_logging
    from minigpt.pipeline import load_recipe, open_dataset
    from minigpt.train.chaos import read_certificate, run_chaos
    from minigpt.train.chaos_cases import CASES

    configure_logging(json=json)
    runs = out.with_name(f"{out.name}-runs")
    for path in (out, runs):
        if path.exists() or is_artifact(path):
            raise ConfigError(f"{path} exists", remedy="choose another --out or remove it")
    config = load_recipe(recipe, [f"mesh.dp={ranks}", *(overrides or [])])
    config = config.replace(data=open_dataset(config.data).uri)
    names = list(CASES) if faults == "all" else [name for name in faults.split(",") if name]
    report = run_chaos(config, names, runs, out)
    certificate = read_certificate(report)
    emit(certificate.model_dump(), json=json, human=lambda: _print(certificate))
    if not certificate.holds:
        raise typer.Exit(1)


def _print(certificate: object) -> None:
    from rich.console import Console
    from rich.table import Table

    from minigpt.train.chaos import Certificate

    assert isinstance(certificate, Certificate)
    table = Table(box=None, padding=(0, 2))
    for title in ("fault", "bits", "recovery", "wall", "goodput", "noticed"):
        table.add_column(title)
    for fault in certificate.faults:
        seconds = fault.recovery_seconds
        table.add_row(
            fault.fault,
            "equal" if fault.equal else "DIFFERENT" if fault.finished else "NOT FINISHED",
            "-" if seconds is None else f"{seconds:.1f} s",
            f"{fault.wall_seconds:.1f} s",
            "-" if fault.goodput is None else f"{fault.goodput:.0%}",
            ", ".join(fault.noticed),
        )
    Console().print(table)
    typer.echo(f"unbroken: losses sha256 {certificate.losses_sha256}")
    typer.echo(f"          weights sha256 {certificate.weights_sha256}")
    verdict = "holds" if certificate.holds else "DOES NOT HOLD"
    typer.echo(
        f"resume equivalence {verdict}: {certificate.ranks} ranks, {certificate.steps} steps"
    )
