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
from minigpt.serve.config import ServeConfig

if TYPE_CHECKING:
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


def _print_ready(endpoint: Endpoint) -> None:
    typer.echo(
        f"ready: {endpoint.url}/v1  model {endpoint.model}  "
        f"context {endpoint.context_length:,} tokens  "
        f"KV cache {endpoint.kv_capacity_tokens:,} tokens  "
        f"started in {endpoint.start_seconds:.1f} s"
    )
