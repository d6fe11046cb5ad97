"""`minigpt artifact`: verify, show and trace artifacts; export a checkpoint's weights."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from minigpt.cli.output import JsonOption, emit
from minigpt.core.artifact import LineageNode, lineage, open_artifact
from minigpt.core.manifest import Manifest

app = typer.Typer()
PathArgument = Annotated[str, typer.Argument(metavar="ARTIFACT", help="A directory or URL.")]


@app.command(epilog="Example: minigpt artifact verify runs/quickstart/train/model")
def verify(artifact: PathArgument, json: JsonOption = False) -> None:
    """Hash every file and compare with the manifest."""
    found = open_artifact(artifact)
    manifest = found.manifest
    size = sum(entry.size for entry in manifest.files.values())
    emit(
        {"ok": True, "id": found.id, "files": len(manifest.files), "bytes": size},
        json=json,
        human=lambda: typer.echo(
            f"ok: {artifact}: {len(manifest.files)} files, {size:,} bytes, id {found.id[:12]}"
        ),
    )


@app.command(epilog="Example: minigpt artifact show runs/quickstart/train/model --json")
def show(artifact: PathArgument, json: JsonOption = False) -> None:
    """Print an artifact's kind, origin, files and metrics."""
    found = open_artifact(artifact, verify=False)
    result = {"uri": found.uri, **found.manifest.model_dump(mode="json")}
    emit(result, json=json, human=lambda: _print_manifest(found.uri, found.manifest))


@app.command(name="lineage", epilog="Example: minigpt artifact lineage runs/quickstart/train/model")
def lineage_command(artifact: PathArgument, json: JsonOption = False) -> None:
    """Print what an artifact was made from, as far back as it can be found."""
    tree = lineage(open_artifact(artifact, verify=False))
    emit(_lineage_dict(tree), json=json, human=lambda: _print_lineage(tree))


@app.command(
    name="export-weights",
    epilog="Example: minigpt artifact export-weights runs/a/checkpoints/step-00000100 out/model",
)
def export_weights_command(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint's directory or URL.")
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Where the model goes.")],
    base: Annotated[
        str | None,
        typer.Option(help="Of adapters: the model they are for, where it has moved."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Write a checkpoint's weights as a model; also while its run goes on. Adapters are merged."""
    from minigpt.train.export_weights import export_weights

    model = export_weights(checkpoint, out, base=base)
    size = sum(entry.size for entry in model.manifest.files.values())
    emit(
        {"model": model.uri, "id": model.id, "bytes": size, "checkpoint": checkpoint},
        json=json,
        human=lambda: typer.echo(f"wrote {model.uri}: {size:,} bytes, id {model.id[:12]}"),
    )


def _print_manifest(uri: str, manifest: Manifest) -> None:
    code = manifest.code
    commit = f" ({code.commit[:12]}{', modified' if code.dirty else ''})" if code.commit else ""
    typer.echo(f"{manifest.kind} {uri}")
    typer.echo(f"  id       {manifest.id}")
    typer.echo(f"  created  {manifest.created_at:%Y-%m-%d %H:%M:%S} UTC")
    typer.echo(f"  code     {code.version}{commit}")
    for parent in manifest.parents:
        typer.echo(f"  parent   {parent.kind} {parent.id[:12]} {parent.uri}")
    for name, entry in manifest.files.items():
        typer.echo(f"  file     {name}  {entry.size:,} bytes  {entry.sha256[:12]}")
    if manifest.tensors:
        typer.echo(f"  tensors  {len(manifest.tensors)}")
    for name, value in _flat(manifest.metrics):
        typer.echo(f"  metric   {name} = {value}")


def _flat(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in tree.items():
        nested = isinstance(value, dict)
        rows += _flat(value, f"{prefix}{key}.") if nested else [(f"{prefix}{key}", value)]
    return rows


def _lineage_dict(node: LineageNode) -> dict[str, Any]:
    found = node.artifact
    return {
        **node.parent.model_dump(),
        "found": found is not None,
        "code": found.manifest.code.model_dump() if found else None,
        "created_at": found.manifest.created_at if found else None,
        "parents": [_lineage_dict(parent) for parent in node.ancestors],
    }


def _print_lineage(node: LineageNode, depth: int = 0) -> None:
    parent = node.parent
    made = f"{node.artifact.manifest.created_at:%Y-%m-%d %H:%M}" if node.artifact else "not found"
    typer.echo(f"{'  ' * depth}{parent.kind} {parent.id[:12]}  {made}  {parent.uri}")
    for ancestor in node.ancestors:
        _print_lineage(ancestor, depth + 1)
