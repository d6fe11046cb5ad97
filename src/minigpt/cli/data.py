"""`minigpt data`: prepare and inspect token datasets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minigpt.cli.output import JsonOption, SetOption, config_epilog, emit
from minigpt.core.config import load_config
from minigpt.core.telemetry import configure_logging
from minigpt.data.config import DataConfig

if TYPE_CHECKING:
    from minigpt.core.artifact import Artifact

app = typer.Typer()


@app.command(
    epilog=config_epilog(
        DataConfig,
        example="minigpt data prepare --set source.kind=pystdlib --out data/pystdlib",
    )
)
def prepare(
    out: Annotated[
        str, typer.Option(metavar="DIR", help="Where to write the dataset: a new path or URL.")
    ],
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG.yaml", help="What to read and how.")
    ] = None,
    overrides: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Read, clean, deduplicate, split and tokenize text into a dataset artifact."""
    configure_logging(json=json)
    settings = load_config(DataConfig, config, overrides or [])
    from minigpt.data.prepare import prepare as prepare_dataset

    artifact = prepare_dataset(settings, out)
    emit(_summary(artifact), json=json, human=lambda: _print_summary(_summary(artifact)))


@app.command(epilog="Example: minigpt data inspect data/pystdlib --samples 5")
def inspect(
    dataset: Annotated[str, typer.Argument(metavar="DIR", help="A dataset's directory or URL.")],
    samples: Annotated[int, typer.Option(min=0, help="How many documents to show.")] = 3,
    json: JsonOption = False,
) -> None:
    """Verify a dataset and show its sizes, what cleaning did and some documents."""
    from minigpt.core.artifact import open_artifact

    artifact = open_artifact(dataset, kind="dataset")
    result = _summary(artifact) | {"samples": _samples(artifact.path, samples)}

    def human() -> None:
        _print_summary(result)
        for sample in result["samples"]:
            typer.echo(f"\n--- {sample['split']} document {sample['document']}, ", nl=False)
            typer.echo(f"{sample['tokens']:,} tokens\n{sample['text']}")

    emit(result, json=json, human=human)


def _summary(artifact: Artifact) -> dict[str, Any]:
    return {"uri": artifact.uri, "id": artifact.id, **artifact.manifest.metrics}


def _samples(directory: Path, count: int) -> list[dict[str, Any]]:
    """Return the beginnings of documents evenly spread over the train split."""
    from minigpt.data.shards import TokenDataset
    from minigpt.data.tokenizer import Tokenizer

    dataset = TokenDataset.open(directory, "train")
    tokenizer = Tokenizer.load(dataset.tokenizer_dir)
    count = min(count, dataset.num_documents)
    chosen = [i * dataset.num_documents // count for i in range(count)]
    return [
        {
            "split": "train",
            "document": i,
            "tokens": len(document := dataset.document(i)),
            "text": tokenizer.decode(document[:150].tolist()),
        }
        for i in chosen
    ]


def _print_summary(result: Mapping[str, Any]) -> None:
    typer.echo(f"dataset {result['uri']}  id {result['id'][:12]}")
    for split, size in result["splits"].items():
        typer.echo(
            f"  {split:<6} {size['documents']:>10,} documents  {size['tokens']:>14,} tokens  "
            f"{size['bytes']:>15,} bytes"
        )
    typer.echo(
        f"  vocabulary {result['vocab_size']:,}, {result['bytes_per_token']:.2f} bytes per token"
    )
    cleaning = result["cleaning"]
    counts = cleaning["counts"]
    typer.echo(f"  documents read {counts['read']:,}, kept {counts['kept']:,}")
    for name, number in counts.items():
        if name not in ("read", "kept"):
            typer.echo(f"    {name.replace('_', ' ')}: {number:,}")
            for example in cleaning["examples"].get(name, [])[:3]:
                typer.echo(f"      {example}")
    spent = ", ".join(f"{name} {seconds:.1f}" for name, seconds in result["seconds"].items())
    typer.echo(f"  seconds: {spent}")
