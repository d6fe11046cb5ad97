"""`minigpt serve`: a model behind an OpenAI-compatible API."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minigpt.cli.output import JsonOption, SetOption, config_epilog, emit
from minigpt.core.artifact import open_artifact
from minigpt.core.config import load_config
from minigpt.core.storage import is_remote
from minigpt.engine.config import EngineConfig
from minigpt.serve.config import ServeConfig

if TYPE_CHECKING:
    from minigpt.engine.preflight import Preflight
    from minigpt.serve.run import Endpoint

app = typer.Typer()


@app.command(
    epilog=config_epilog(
        ServeConfig, example="minigpt serve champion --port 8000 --set engine.max_num_seqs=16"
    )
)
def serve(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A model directory (artifact or Hugging Face), an artifact's URL, or what the "
            "registry knows: MODEL, MODEL/3, MODEL@challenger, champion. A path that exists wins.",
        ),
    ],
    config: Annotated[Path | None, typer.Option(help="A YAML file of the keys below.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 lets the system choose.")] = None,
    served_model_name: Annotated[
        str | None,
        typer.Option(help="What clients call it; default: the directory's or registered name."),
    ] = None,
    preflight: Annotated[
        bool,
        typer.Option(
            "--preflight", help="Only say what memory serving takes, or what is missing; load none."
        ),
    ] = False,
    overrides: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Serve a model until Ctrl-C or SIGTERM; running answers are finished first.

    Logs go to standard error; standard output gets one line when the server is ready.
    """
    assignments = list(overrides or ())
    assignments += [] if host is None else [f"host={host}"]
    assignments += [] if port is None else [f"port={port}"]
    settings = load_config(ServeConfig, config, assignments)
    path, name = _resolve(model)
    if preflight:
        _preflight(path, settings.engine, json=json)
        return

    from minigpt.serve.run import serve as run

    def announce(endpoint: Endpoint) -> None:
        emit(dataclasses.asdict(endpoint), json=json, human=lambda: _print_ready(endpoint))

    run(settings, path, served_model_name or name, on_ready=announce)


def _resolve(model: str) -> tuple[Path, str]:
    """Find a model's directory and the name to serve it under."""
    if Path(model).exists():
        return Path(model), Path(model).resolve().name
    if is_remote(model):
        return open_artifact(model, kind="model", verify=False).path, model.rstrip("/").split("/")[
            -1
        ]
    from minigpt.release.registry import Registry

    registry = Registry()
    version = registry.get(model)
    # The engine verifies the weights when it loads them.
    return registry.open(version, verify=False).path, version.model


def _preflight(path: Path, config: EngineConfig, *, json: bool) -> None:
    from minigpt.engine.preflight import preflight

    plan = preflight(path, config, report=lambda line: None)
    emit(dataclasses.asdict(plan), json=json, human=lambda: _print_plan(path, plan))


def _print_plan(path: Path, plan: Preflight) -> None:
    contexts = plan.max_concurrent_tokens / plan.context_length
    ranks = plan.tensor_parallel_size
    each = "" if ranks == 1 else f", on each of {ranks} ranks"
    typer.echo(f"fits: {path} in {plan.dtype} on {plan.device}{each}")
    if plan.activation_bits == 8:
        typer.echo("  activations                           8 bits, before integer weights")
    typer.echo(f"  free memory            {plan.available_bytes:>16,} bytes")
    typer.echo(f"  weights                {plan.weight_bytes:>16,} bytes")
    typer.echo(f"  KV cache               {plan.kv_cache_bytes:>16,} bytes")
    each = f"{plan.kv_bytes_per_token:>16,} bytes in {plan.kv_cache_dtype}"
    typer.echo(f"  KV cache of a token    {each}")
    typer.echo(
        f"  concurrent tokens      {plan.max_concurrent_tokens:>16,} at most: "
        f"{contexts:.1f} contexts of {plan.context_length:,}"
    )


def _print_ready(endpoint: Endpoint) -> None:
    ranks = endpoint.tensor_parallel_size
    parallel = "" if ranks == 1 else f"tensor parallel {ranks}  "
    typer.echo(
        f"ready: {endpoint.url}/v1  model {endpoint.model}  "
        f"context {endpoint.context_length:,} tokens  "
        f"KV cache {endpoint.kv_capacity_tokens:,} tokens  {parallel}"
        f"started in {endpoint.start_seconds:.1f} s"
    )
