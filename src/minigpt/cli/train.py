"""`minigpt train`: start a training run, or resume the one in a directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from minigpt.cli.charts import curve
from minigpt.cli.output import JsonOption, SetOption, config_epilog, emit
from minigpt.train.config import TrainConfig

app = typer.Typer()


@app.command(
    epilog=config_epilog(
        TrainConfig, example="minigpt train recipes/tiny.yaml --run-dir runs/tiny --set steps=100"
    )
)
def train(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="A YAML file of the keys below.")
    ],
    run_dir: Annotated[
        Path,
        typer.Option("--run-dir", metavar="DIR", help="The run's directory, made if missing."),
    ],
    size: Annotated[
        int | None,
        typer.Option(metavar="N", help="The one dial, same as --set size=N; all else follows."),
    ] = None,
    on: Annotated[
        Literal["here", "ray"], typer.Option(help="ray: on the workers of a Ray cluster.")
    ] = "here",
    workers: Annotated[
        int, typer.Option(min=1, help="With --on ray: processes, the size of the mesh.")
    ] = 1,
    max_failures: Annotated[
        int, typer.Option(min=0, help="With --on ray: how often lost workers are replaced.")
    ] = 3,
    overrides: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Train a model from a recipe, or resume its run.

    Where DIR holds a run it is resumed, bit for bit, with the config it began with; a finished
    run prints its result. Ctrl-C saves and stops; the same command goes on from there. With a
    mesh of several processes they are started here, watched, and restarted when one fails.

    minigpt train goodput DIR says where a run's time and money went; minigpt train plot DIR draws
    its curves.
    """
    from minigpt.cluster.ray_train import RayTrainConfig
    from minigpt.core.clock import SystemClock
    from minigpt.core.telemetry import configure_logging
    from minigpt.pipeline import train_recipe, train_recipe_on_ray
    from minigpt.train.metrics import read_metrics
    from minigpt.train.progress import process_start
    from minigpt.train.run import METRICS_FILE, read_final
    from minigpt.train.world import is_first_rank

    configure_logging(json=json)
    dial = [] if size is None else [f"size={size}"]
    assignments = [*dial, *(overrides or [])]
    if on == "ray":
        ray = RayTrainConfig(workers=workers, max_failures=max_failures)
        train_recipe_on_ray(recipe, run_dir, assignments, ray)
    else:
        began = process_start(SystemClock())
        train_recipe(recipe, run_dir, assignments, began=began, json_logs=json)
    if not is_first_rank():
        return
    final = read_final(run_dir)
    losses = [line["loss"] for line in read_metrics(run_dir / METRICS_FILE)]
    emit(final, json=json, human=lambda: _print_result(final, losses))


def _print_result(final: dict[str, Any], losses: list[float]) -> None:
    typer.echo(curve(losses, label=f"loss over {final['steps']} steps (nats per token)"))
    typer.echo()
    if final["bits_per_byte"] is not None:
        typer.echo(f"bits per byte  {final['bits_per_byte']:.4f} on held-out text")
    typer.echo(f"steps          {final['steps']:,} ({final['tokens']:,} tokens)")
    typer.echo(f"speed          {final['tokens_per_second']:,.0f} tokens/s")
    typer.echo(f"parameters     {final['parameters']:,}")
    typer.echo(f"weights        sha256 {final['weights_sha256']}")
    typer.echo(f"model          {final['model']}")
