"""`minigpt compress`: make a model smaller and report what that cost."""

from __future__ import annotations

import json as json_module
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from minigpt.cli.evaluate import resolve_model
from minigpt.cli.output import JsonOption, SetOption, config_epilog, emit
from minigpt.compress.config import CompressConfig
from minigpt.core.artifact import open_artifact
from minigpt.core.config import load_config
from minigpt.core.telemetry import configure_logging

app = typer.Typer()


@app.command(
    epilog=config_epilog(
        CompressConfig,
        example="minigpt compress runs/a/model --data data/pystdlib --out runs/a/int8",
    )
)
def compress(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A model directory, an artifact's URL, or a name in the registry (champion).",
        ),
    ],
    out: Annotated[
        str,
        typer.Option(
            metavar="DIR", help="Where to write the model; its report goes to DIR-report."
        ),
    ],
    data: Annotated[
        str, typer.Option(metavar="DATASET", help="Measure both on its held-out documents.")
    ],
    method: Annotated[str | None, typer.Option(help="int8 or int4. Same as --set method.")] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML file of the keys below.")] = None,
    overrides: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Make a model smaller; measure size, bits per byte and decode speed before and after."""
    configure_logging(json=json, level="warning")
    assignments = list(overrides or ())
    assignments += [] if method is None else [f"method={method}"]
    settings = load_config(CompressConfig, config, assignments)
    from minigpt.compress.quantize import quantize
    from minigpt.compress.report import COMPRESSION_FILE, compression_report
    from minigpt.evaluate.run import check_free

    report_path = f"{out.rstrip('/')}-report"
    check_free(report_path)
    path = resolve_model(model)
    dataset = open_artifact(data, kind="dataset")
    made = quantize(path, out, settings)
    report = compression_report(path, made, dataset, report_path, settings)
    content = json_module.loads((report.path / COMPRESSION_FILE).read_text(encoding="utf-8"))
    result = {"uri": made.uri, "id": made.id, "report": report.uri, **content}
    emit(result, json=json, human=lambda: _print_result(result))


def _print_result(result: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from minigpt.compress.report import Spread, describe_speed

    before, after = result["before"], result["after"]
    table = Table("", "before", "after", "change", box=None, pad_edge=False)
    for key, label in (
        ("disk_bytes", "MB on disk"),
        ("resident_weight_bytes", "MB of weights in memory"),
    ):
        old, new = before[key], after[key]
        table.add_row(label, f"{old / 1e6:.2f}", f"{new / 1e6:.2f}", f"{new / old:.2f}x")
    change = result["bits_per_byte_change"]
    interval = "" if change["low"] is None else f" ({change['low']:+.4f} to {change['high']:+.4f})"
    table.add_row(
        "bits per byte",
        f"{before['bits_per_byte']['estimate']:.4f}",
        f"{after['bits_per_byte']['estimate']:.4f}",
        f"{change['estimate']:+.4f}{interval}",
    )
    table.add_row(
        "decode tokens/s",
        _spread(before["decode_tokens_per_second"]),
        _spread(after["decode_tokens_per_second"]),
        describe_speed(Spread(**result["speedup"])),
    )
    if (rounded := result["speedup_with_8_bit_activations"]) is not None:
        words = describe_speed(Spread(**rounded))
        table.add_row("  with engine.activation_bits=8", "", "", words)
    console = Console(highlight=False)
    groups = result["group_size"]
    method = result["method"] + (f" in groups of {groups}" if groups else "")
    console.print(
        f"{method}; both measured on this machine's {result['device']} with activations "
        f"in {result['dtype']}, {result['threads']} threads, {result['batch']} sequence(s) at "
        f"once, by {' and '.join(dict.fromkeys(result['runners']))}"
    )
    console.print(table)
    console.print(f"model:  {result['uri']}\nreport: {result['report']}", soft_wrap=True)


def _spread(speed: Mapping[str, float]) -> str:
    return f"{speed['median']:.0f} ({speed['low']:.0f}-{speed['high']:.0f})"
