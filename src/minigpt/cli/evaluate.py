"""`minigpt evaluate`: measure a model from its files and judge it by a gate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minigpt.cli.output import JsonOption, SetOption, config_epilog, emit
from minigpt.core.artifact import is_artifact, open_artifact
from minigpt.core.config import load_config
from minigpt.core.errors import ConfigError, GateError, RegistryError
from minigpt.core.storage import is_remote
from minigpt.core.telemetry import configure_logging
from minigpt.evaluate.config import EvaluateConfig, GateConfig, metric_info

if TYPE_CHECKING:
    from minigpt.evaluate.gate import Evidence

_WIDE = 110
"""Columns of a terminal from which on the metrics' meanings fit beside them."""

app = typer.Typer()


@app.command(
    epilog=config_epilog(
        EvaluateConfig,
        example="minigpt evaluate runs/a/model --data data/pystdlib --out runs/a/report "
        "--gate gates/quickstart.yaml",
    )
)
def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A model directory, an artifact's URL, or a name in the registry (champion).",
        ),
    ],
    data: Annotated[
        str, typer.Option(metavar="DATASET", help="Score this dataset's held-out documents.")
    ],
    out: Annotated[str, typer.Option(metavar="REPORT", help="Where to write the report artifact.")],
    gate: Annotated[
        Path | None,
        typer.Option(
            metavar="GATE.yaml", help="Judge by these rules; exit code 1 unless they all pass."
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="REPORT|NAME",
            help="What the gate's regressions are measured against: a report, or a model in the "
            "registry, whose report it is. Default: what the gate names.",
        ),
    ] = None,
    parity: Annotated[
        str | None,
        typer.Option(
            metavar="REPORT", help="A report of `minigpt parity` on this model, for the gate."
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=0, help="Code completions to parse; same as --set samples.")
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="An lm-eval task file over local data; may repeat."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML file of the keys below.")] = None,
    overrides: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Measure a model on held-out text, from its verified files, and judge it by a gate."""
    configure_logging(json=json)
    settings = load_config(EvaluateConfig, config, overrides or [])
    if samples is not None:
        settings = settings.replace(samples=samples)
    if tasks:
        settings = settings.replace(tasks=tuple(tasks))
    rules = load_config(GateConfig, gate) if gate is not None else None
    named = baseline or (rules.baseline if rules else None)
    if baseline is not None and (rules is None or not rules.regressions):
        raise ConfigError(
            f"--baseline {baseline} has no use without a gate that allows regressions",
            remedy="add --gate with a file that has `regressions`",
        )
    from minigpt.evaluate.gate import Evidence
    from minigpt.evaluate.run import evaluate as run

    path = resolve_model(model)
    reference = _baseline(named) if named is not None and rules and rules.regressions else None
    dataset = open_artifact(data, kind="dataset")
    certificate = None if parity is None else open_artifact(parity, kind="report")
    made = run(path, dataset, out, settings, gate=rules, baseline=reference, parity=certificate)
    report = Evidence.load(made.path).report
    result = {"uri": made.uri, "id": made.id, **report.model_dump(mode="json")}
    emit(result, json=json, human=lambda: _print_report(result))
    if report.verdict is not None and report.verdict.verdict != "pass":
        kept = sum(rule.verdict == "pass" for rule in report.verdict.rules)
        raise GateError(
            f"gate {gate}: {report.verdict.verdict}; {kept} of {len(report.verdict.rules)} rules "
            f"passed; {report.verdict.broken()}",
            remedy=f"the numbers are in {made.uri}",
        )


def resolve_model(model: str) -> str | Path:
    """Return a path or URL as it is, and anything else as the registry resolves it."""
    if is_remote(model) or Path(model).exists():
        return model
    from minigpt.release.registry import Registry

    return Registry().resolve(model)


def _baseline(name: str) -> Evidence | None:
    """Open the report that a baseline names; None where the registry has no such model yet."""
    from minigpt.evaluate.gate import Evidence

    if is_remote(name) or is_artifact(name):
        return Evidence.load(name)
    from minigpt.release.registry import Registry
    from minigpt.release.version import NothingThereYetError

    try:
        version = Registry().get(name)
    except NothingThereYetError as error:
        typer.echo(f"no baseline: {error}", err=True)
        return None
    if not version.evidence:
        raise RegistryError(
            f"{version.reference} has no report to compare with",
            remedy="register it with --report, or give a report as --baseline",
        )
    return Evidence.load(version.evidence[-1].report_uri)


def _print_report(result: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    is_wide = console.width >= _WIDE
    table = Table("metric", "value", "interval", box=None, pad_edge=False)
    if is_wide:
        table.add_column("meaning")
    for name, value in result["metrics"].items():
        row = (name, f"{value['estimate']:.4f}", _interval(value), metric_info(name).meaning)
        table.add_row(*row[: 3 + is_wide])
    console.print(
        f"{result['documents']:,} documents, {result['bytes']:,} bytes, "
        f"{result['tokens']:,} tokens in windows of {result['context_length']:,}; "
        f"run in {result['dtype']} on {result['device']}"
    )
    console.print(table)
    for note in result["notes"]:
        console.print(f"note: {note}")
    if result["verdict"] is not None:
        _print_verdict(console, result["verdict"])
    console.print(f"report: {result['uri']}", soft_wrap=True)


def _print_verdict(console: Any, verdict: Mapping[str, Any]) -> None:
    from rich.table import Table

    table = Table("metric", "rule", "found", "interval", "verdict", box=None, pad_edge=False)
    for rule in verdict["rules"]:
        found = "" if rule["value"] is None else f"{rule['value']:.4f}"
        table.add_row(rule["metric"], rule["rule"], found, _interval(rule), rule["verdict"])
    console.print()
    console.print(table)
    for rule in verdict["rules"]:
        if rule["verdict"] != "pass":
            console.print(f"{rule['metric']}: {rule['verdict']}, {rule['reason']}")
    against = f" against {verdict['baseline_uri']}" if verdict["baseline_uri"] else ""
    console.print(f"gate: {verdict['verdict']}{against}", soft_wrap=True)


def _interval(value: Mapping[str, Any]) -> str:
    return "" if value["low"] is None else f"{value['low']:.4f} to {value['high']:.4f}"
