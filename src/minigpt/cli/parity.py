"""`minigpt parity`: whether serving computes what training computed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from minigpt.cli.evaluate import resolve_model
from minigpt.cli.output import JsonOption, SetOption, config_epilog, emit
from minigpt.core.config import load_config
from minigpt.core.telemetry import configure_logging
from minigpt.engine.config import ParityConfig

app = typer.Typer()


@app.command(
    epilog=config_epilog(
        ParityConfig, example="minigpt parity runs/a/model --dtype bfloat16 --out runs/a/parity"
    )
)
def parity(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A model directory, an artifact's URL, or a name in the registry (champion).",
        ),
    ],
    out: Annotated[str, typer.Option(metavar="REPORT", help="Where to write the report artifact.")],
    text: Annotated[
        Path | None, typer.Option(help="Compare over this file; default: Python's argparse.py.")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="Serve in this type; may repeat. Same as --set dtypes.")
    ] = None,
    kv_cache_dtype: Annotated[
        list[str] | None,
        typer.Option(
            help="With keys and values in this type; may repeat. Same as --set kv_cache_dtypes."
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="What a quantized MODEL was made from; default: itself."
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML file of the keys below.")] = None,
    overrides: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Compare training-side and serving-side log-probabilities over a text."""
    configure_logging(json=json, level="warning")
    assignments = list(overrides or ())
    assignments += [f"dtypes=[{','.join(dtype)}]"] if dtype else []
    caches = kv_cache_dtype or ()
    assignments += [f"kv_cache_dtypes=[{','.join(caches)}]"] if caches else []
    settings = load_config(ParityConfig, config, assignments)
    from minigpt.engine.parity import certify
    from minigpt.evaluate.certificate import load_parity

    base = None if reference is None else resolve_model(reference)
    made = certify(resolve_model(model), out, settings, text=text, reference=base)
    result = {"uri": made.uri, "id": made.id, **load_parity(made).model_dump(mode="json")}
    emit(result, json=json, human=lambda: _print_result(result))


def _print_result(result: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("served", "against", "phase", "tokens", "max |delta|", "p99 |delta|", "mean KL",
                  "greedy agreement", box=None, pad_edge=False)  # fmt: skip
    for row in result["rows"]:
        served = row["served_dtype"]
        served += "" if row["quantization"] == "none" else f" {row['quantization']}"
        served += f" a{row['activation_bits']}" if row["activation_bits"] else ""
        served += "" if row["kv_dtype"] == row["served_dtype"] else f", KV {row['kv_dtype']}"
        served += f", {row['runner']}"
        for phase in ("prefill", "decode"):
            found = row[phase]
            kl = "" if found["mean_kl"] is None else f"{found['mean_kl']:.2e}"
            table.add_row(
                served, row["reference_dtype"], phase, f"{found['tokens']:,}",
                f"{found['max_delta']:.2e}", f"{found['p99_delta']:.2e}", kl,
                f"{found['greedy_agreement']:.2%}",
            )  # fmt: skip
    console = Console(highlight=False)
    console.print(
        f"{result['windows']} windows of {result['context_length']} tokens on {result['device']}; "
        "differences of log-probabilities in nats, KL over the whole vocabulary"
    )
    console.print(table)
    console.print(f"report: {result['uri']}", soft_wrap=True)
