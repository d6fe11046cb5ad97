"""`minigpt models`: the registry's versions and aliases; import and export of weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minigpt.cli.output import JsonOption, emit
from minigpt.core.errors import ConfigError

if TYPE_CHECKING:
    from minigpt.release.registry import Registry
    from minigpt.release.version import ModelVersion

app = typer.Typer()

RegistryOption = Annotated[
    str | None,
    typer.Option(
        "--registry",
        metavar="URI",
        envvar="MINIGPT_REGISTRY_URI",
        help="A database or MLflow server; default: mlflow.db in minigpt's home.",
    ),
]
ReferenceArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="MODEL/3, MODEL@challenger, MODEL (its champion) or champion."
    ),
]


@app.command(name="list", epilog="Example: minigpt models list quickstart")
def list_command(
    name: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Show this model's versions.")
    ] = None,
    registry: RegistryOption = None,
    json: JsonOption = False,
) -> None:
    """List registered models, or one model's versions."""
    found = _registry(registry)
    if name is None:
        models = [{"model": model, "aliases": aliases} for model, aliases in found.models().items()]
        emit({"models": models}, json=json, human=lambda: _print_models(models))
        return
    versions = [_summary(version) for version in found.versions(name)]
    result = {"model": name, "versions": versions}
    emit(result, json=json, human=lambda: _print_versions(versions))


@app.command(epilog="Example: minigpt models show quickstart@champion")
def show(
    reference: ReferenceArgument, registry: RegistryOption = None, json: JsonOption = False
) -> None:
    """Show a version: where it is, what judged it, which data, code and run it came from."""
    version = _registry(registry).get(reference)
    result = _summary(version) | {
        "evidence": [each.model_dump(mode="json") for each in version.evidence],
        "data": {"id": version.origin.data_id, "uri": version.origin.data_uri},
        "code": {"version": version.origin.code_version, "commit": version.origin.code_commit},
        "run_dir": version.origin.run_dir,
    }
    emit(result, json=json, human=lambda: _print_version(result))


@app.command(
    epilog="Example: minigpt models register runs/a/int8 --name tiny --report runs/a/int8-report"
)
def register(
    model: Annotated[str, typer.Argument(metavar="ARTIFACT", help="A model artifact.")],
    name: Annotated[str, typer.Option(help="The registered model; made if it is new.")],
    report: Annotated[
        str | None,
        typer.Option(help="An evaluation of this very artifact, with a gate's verdict."),
    ] = None,
    registry: RegistryOption = None,
    json: JsonOption = False,
) -> None:
    """Make an artifact a version; for one that is registered, add a report's verdict to it."""
    result = _summary(_registry(registry).register(model, name, report))
    emit(
        result,
        json=json,
        human=lambda: typer.echo(
            f"{result['model']}/{result['version']}: {result['uri']}, gate: {result['verdict']}"
        ),
    )


@app.command(epilog="Example: minigpt models promote quickstart/2 --why 'better on Python'")
def promote(
    reference: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="MODEL/3, MODEL@challenger, or MODEL for its newest version."
        ),
    ],
    alias: Annotated[str, typer.Option(help="champion or challenger.")] = "champion",
    why: Annotated[str, typer.Option(help="The reason, for the history.")] = "",
    by: Annotated[str | None, typer.Option(help="Who; default: user@host.")] = None,
    registry: RegistryOption = None,
    json: JsonOption = False,
) -> None:
    """Let an alias name a version; refused unless its files verify and its gate passed."""
    found = _registry(registry)
    version = found.newest(reference)
    change = found.promote(version.reference, alias, by=by, why=why)
    result = {
        "model": version.model,
        "version": version.version,
        "alias": alias,
        "changed": change is not None,
        "from_version": change.from_version if change else version.version,
    }
    before = "nothing" if result["from_version"] is None else f"version {result['from_version']}"
    line = f"{version.reference} is {alias}" + (f", before: {before}" if change else " already")
    emit(result, json=json, human=lambda: typer.echo(line))


@app.command(epilog="Example: minigpt models history quickstart")
def history(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A registered model.")],
    registry: RegistryOption = None,
    json: JsonOption = False,
) -> None:
    """Show which version each alias named when, by whom and why; nothing is ever removed."""
    changes = [change.model_dump(mode="json") for change in _registry(registry).history(model)]
    emit({"model": model, "changes": changes}, json=json, human=lambda: _print_history(changes))


@app.command(name="import", epilog="Example: minigpt models import ~/Qwen3-0.6B --out models/qwen3")
def import_command(
    source: Annotated[str, typer.Argument(metavar="HF_DIR", help="A Hugging Face directory.")],
    out: Annotated[str, typer.Option(metavar="DIR", help="Where to write the model artifact.")],
    json: JsonOption = False,
) -> None:
    """Make a model artifact of a Hugging Face directory, after checking that it can run."""
    from minigpt.core.artifact import create_artifact
    from minigpt.data.tokenizer import Tokenizer
    from minigpt.model.weights import check_vocab, load_model, save_model

    loaded = load_model(source)
    tokenizer = Tokenizer.load(loaded.path)
    check_vocab(loaded.config, tokenizer.vocab_size)
    recorded = {"import": {"source": str(Path(source).absolute()), "id": loaded.id}}
    with create_artifact(out, kind="model", config=recorded) as draft:
        # Written anew rather than copied, so that pickles and stray files stay behind.
        save_model(draft.path, loaded.model, loaded.config)
        tokenizer.copy_to(draft.path)
    assert draft.artifact is not None
    result: dict[str, Any] = {
        "uri": draft.artifact.uri,
        "id": draft.artifact.id,
        "parameters": loaded.config.parameter_counts().total,
        "config": loaded.config.model_dump(mode="json"),
    }
    emit(
        result,
        json=json,
        human=lambda: typer.echo(
            f"{result['uri']}: {result['parameters']:,} parameters, id {result['id'][:12]}"
        ),
    )


@app.command(epilog="Example: minigpt models export champion --out exported --max-shard-size 1GB")
def export(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model directory or a name in the registry.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="A new directory.")],
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Largest weight file, for example 500MB or 5GB.")
    ] = "5GB",
    registry: RegistryOption = None,
    json: JsonOption = False,
) -> None:
    """Write a model as a plain Hugging Face directory, which transformers and others read."""
    import shutil

    from minigpt.core.storage import storage_errors
    from minigpt.data.tokenizer import TOKENIZER_FILE
    from minigpt.model.weights import load_model, save_model

    limit = _bytes(max_shard_size)
    loaded = load_model(_registry(registry).resolve(model))
    if out.exists():
        raise ConfigError(f"{out} exists", remedy="choose another --out or remove it")
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        has_tokenizer = (loaded.path / TOKENIZER_FILE).is_file()
        save_model(
            temporary,
            loaded.model,
            loaded.config,
            loaded.path if has_tokenizer else None,
            max_shard_bytes=limit,
        )
        with storage_errors(f"write {out}"):
            temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    files = sorted(path.name for path in out.iterdir())
    is_quantized = any(name.endswith(".scale") for name in loaded.model.state_dict())
    result = {
        "path": str(out.absolute()),
        "source": str(loaded.path),
        "files": files,
        "readable_by": "minigpt" if is_quantized else "minigpt and transformers",
    }
    line = f"{out}: {', '.join(files)}; readable by {result['readable_by']}"
    emit(result, json=json, human=lambda: typer.echo(line))


@app.command(
    epilog="Example: minigpt models merge-adapter runs/base/model runs/lora/adapter models/merged"
)
def merge_adapter(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="The model that the adapter was trained on.")
    ],
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="An adapter artifact or a PEFT directory.")
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Where to write the model artifact.")],
    json: JsonOption = False,
) -> None:
    """Merge a LoRA adapter into its base; the result is a plain model. Sums are in float32."""
    from minigpt.core.artifact import create_artifact, is_artifact, open_artifact
    from minigpt.data.tokenizer import TOKENIZER_FILE
    from minigpt.model.lora import load_adapter, merged_state
    from minigpt.model.weights import load_model, save_model

    loaded = load_model(base)
    parents = [open_artifact(base, verify=False)] if is_artifact(loaded.path) else []
    directory = Path(adapter)
    if is_artifact(directory):
        found = open_artifact(adapter, kind="adapter")
        origins = [parent for parent in found.manifest.parents if parent.kind == "model"]
        if origins and loaded.id not in [parent.id for parent in origins]:
            raise ConfigError(
                f"{adapter} was trained on {origins[0].uri} ({origins[0].id[:12]}), "
                f"not on {base} ({loaded.id[:12]})",
                remedy="merge it into that one",
            )
        parents.append(found)
    read = load_adapter(directory)
    read.apply(loaded.model)
    recorded = {"merge": {"base": base, "adapter": adapter, "lora": read.config.model_dump()}}
    with create_artifact(out, kind="model", parents=parents, config=recorded) as draft:
        has_tokenizer = (loaded.path / TOKENIZER_FILE).is_file()
        tokenizer_dir = loaded.path if has_tokenizer else None
        save_model(draft.path, merged_state(loaded.model), loaded.config, tokenizer_dir)
    assert draft.artifact is not None
    result = {"uri": draft.artifact.uri, "id": draft.artifact.id, "rank": read.config.rank}
    emit(
        result,
        json=json,
        human=lambda: typer.echo(
            f"{result['uri']}: rank {result['rank']} merged, id {draft.artifact.id[:12]}"  # type: ignore[union-attr]
        ),
    )


def _registry(uri: str | None) -> Registry:
    from minigpt.release.registry import Registry

    return Registry(uri)


def _summary(version: ModelVersion) -> dict[str, Any]:
    return {
        "model": version.model,
        "version": version.version,
        "aliases": list(version.aliases),
        "verdict": version.verdict,
        "uri": version.origin.artifact_uri,
        "id": version.origin.artifact_id,
        "created_at": version.created_at,
    }


def _print_models(models: Sequence[Mapping[str, Any]]) -> None:
    if not models:
        typer.echo("no models yet; see `minigpt models register --help`")
    for model in models:
        aliases = ", ".join(f"{alias}: {number}" for alias, number in model["aliases"].items())
        typer.echo(f"{model['model']}  {aliases or 'no aliases'}")


def _print_versions(versions: Sequence[Mapping[str, Any]]) -> None:
    for version in versions:
        aliases = f"  ({', '.join(version['aliases'])})" if version["aliases"] else ""
        typer.echo(
            f"{version['model']}/{version['version']}{aliases}  gate: {version['verdict']}  "
            f"{version['created_at']:%Y-%m-%d %H:%M} UTC  {version['uri']}"
        )


def _print_version(result: Mapping[str, Any]) -> None:
    aliases = f" ({', '.join(result['aliases'])})" if result["aliases"] else ""
    code = result["code"]
    lines = {
        "artifact": f"{result['uri']}  {result['id'][:12]}",
        "created": f"{result['created_at']:%Y-%m-%d %H:%M:%S} UTC",
        "data": f"{result['data']['uri']}  {result['data']['id'][:12]}".strip(),
        "code": f"{code['version']} {code['commit']}".strip(),
        "run": result["run_dir"],
    }
    typer.echo(f"{result['model']}/{result['version']}{aliases}")
    for label, text in lines.items():
        typer.echo(f"  {label:<9} {text or 'unknown'}")
    for each in result["evidence"]:
        typer.echo(f"  gate      {each['verdict']}  {each['report_uri']}  {each['at'][:19]}")
    if not result["evidence"]:
        typer.echo("  gate      none has judged it")


def _print_history(changes: Sequence[Mapping[str, Any]]) -> None:
    if not changes:
        typer.echo("no alias was ever set")
    for change in changes:
        before, after = (
            "nothing" if number is None else str(number)
            for number in (change["from_version"], change["to_version"])
        )
        why = f"  {change['why']}" if change["why"] else ""
        typer.echo(
            f"{change['at'][:19]}  {change['alias']}: {before} -> {after}  {change['by']}{why}"
        )


def _bytes(text: str) -> int:
    """Read a size such as 500MB (decimal units, as Hugging Face has them)."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = text[:-2], text[-2:].upper()
    if unit not in units or not number.strip().isdecimal() or int(number) == 0:
        raise ConfigError(
            f"--max-shard-size {text!r} is no size", remedy="write it as 500MB or 5GB"
        )
    return int(number) * units[unit]
