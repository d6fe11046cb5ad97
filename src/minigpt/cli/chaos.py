"""`minigpt chaos`: inject faults into real runs and certify that the result is the same."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minigpt.cli.output import JsonOption, SetOption, emit

if TYPE_CHECKING:
    from minigpt.train.chaos import Certificate, FaultReport

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
    ranks: Annotated[
        int | None,
        typer.Option(min=1, help="Data parallel ranks; 2 where no mesh is given otherwise."),
    ] = None,
    faults: Annotated[
        str, typer.Option(help="Faults, separated by commas; `all` is every one.")
    ] = DEFAULT_FAULTS,
    overrides: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Train a small run unbroken and under faults, and compare every loss and the weights.

    Faults: kill, kill-forward, kill-reduce, kill-save, kill-validate (kill -9 there), term
    (SIGTERM), stop (SIGSTOP), hang, slow, nan, diverge (a bit of a replica's weights), bitflip
    (a bit of a checkpoint), disk (full, needs root), lost-s3 (needs moto), tracker (lost). Any
    mesh will do, as --set mesh.tp=2. Exits with 1 where a run did not end with the unbroken run's
    bits, or a fault did not come about.
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
    config = load_recipe(recipe, overrides or [])
    if ranks is not None or config.mesh.size == 1:
        config = config.replace(mesh=config.mesh.replace(dp=ranks or 2))
    config = config.replace(data=open_dataset(config.data).uri)
    names = list(CASES) if faults == "all" else [name for name in faults.split(",") if name]
    report = run_chaos(config, names, runs, out)
    certificate = read_certificate(report)
    emit(certificate.model_dump(), json=json, human=lambda: _print(certificate))
    if not certificate.holds:
        raise typer.Exit(1)


def _verdict(fault: FaultReport) -> str:
    if not fault.finished:
        return "NOT FINISHED"
    if not fault.happened:
        return "NO FAULT"
    return "equal" if fault.equal else "DIFFERENT"


def _print(certificate: Certificate) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 1))
    for title in ("fault", "bits", "recovery", "unsaved", "wall", "goodput", "noticed"):
        table.add_column(title, overflow="fold")

    def show(seconds: float | None) -> str:
        return "-" if seconds is None else f"{seconds:.1f} s"

    for fault in certificate.faults:
        table.add_row(
            fault.fault,
            _verdict(fault),
            show(fault.recovery_seconds),
            show(fault.unsaved_seconds),
            show(fault.wall_seconds),
            "-" if fault.goodput is None else f"{fault.goodput:.0%}",
            "\n".join(fault.noticed),
        )
    Console().print(table)
    typer.echo(f"unbroken: losses sha256 {certificate.losses_sha256}")
    typer.echo(f"          weights sha256 {certificate.weights_sha256}")
    verdict = "holds" if certificate.holds else "DOES NOT HOLD"
    typer.echo(
        f"resume equivalence {verdict}: {certificate.ranks} ranks, {certificate.steps} steps"
    )
