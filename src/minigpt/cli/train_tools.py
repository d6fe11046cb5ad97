"""`minigpt train goodput|plot|verify-parallel`: looking at a run, and at a mesh before one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from minigpt.cli.output import JsonOption, emit
from minigpt.cli.verify_parallel import verify_parallel

app = typer.Typer()
app.command("verify-parallel")(verify_parallel)

RunArgument = Annotated[
    Path, typer.Argument(metavar="DIR", help="A run's directory, running or finished.")
]


@app.callback()
def train() -> None:
    """Look at a training run."""


@app.command()
def goodput(
    run_dir: RunArgument,
    price: Annotated[
        float | None,
        typer.Option(help="Price per device-hour; default is recovery.price_per_device_hour."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Say where the wall time and the money of a run went, and how often it failed."""
    from minigpt.train.account import account_for

    account = account_for(run_dir, price)
    emit(account, json=json, human=lambda: _print_account(account))


@app.command()
def plot(
    run_dir: RunArgument,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where to; default is DIR/plots.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Draw a run's loss, bits per byte, speed and time ledger as PNG and HTML."""
    from minigpt.train.plots import plot_run

    paths = plot_run(run_dir, out or run_dir / "plots")
    written = {name: str(path) for name, path in paths.items()}
    emit(written, json=json, human=lambda: typer.echo("\n".join(written.values())))


def _print_account(account: dict[str, Any]) -> None:
    wall = account["wall_seconds"]
    for name, seconds in account["seconds"].items():
        typer.echo(f"{name:<14} {seconds:>12,.1f} s  {seconds / max(wall, 1e-9):>7.1%}")
    typer.echo(f"{'wall clock':<14} {wall:>12,.1f} s  (unaccounted {account['unaccounted']:.2%})")
    typer.echo(f"{'goodput':<14} {account['goodput']:>14.1%}")
    typer.echo(f"sessions {account['sessions']}, failures {account['failures']}")
    rate, saves = account["rate"], account["checkpoint"]
    typer.echo(
        f"failures an hour {rate['estimate']:.3g} "
        f"(95 %: {rate['lower']:.3g} to {rate['upper']:.3g}), "
        f"chance of none in a day {account['reliability_day']:.1%} at the upper bound"
    )
    if saves is not None:
        interval = f"best interval {saves['interval_seconds']:.0f} s"
        typer.echo(f"a save takes {saves['seconds']:.2f} s; {interval}")
    if account["cost"] is not None:
        cost = account["cost"]
        typer.echo(f"cost {cost['total']:.4g}")
        typer.echo(f"  per million tokens        {cost['per_million_tokens']:.4g}")
        if cost["per_bit_per_byte"] is not None:
            typer.echo(f"  per bit per byte gained   {cost['per_bit_per_byte']:.4g}")
