"""`minigpt data`: prepare and inspect token datasets, explain and skip what a run is fed."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minigpt.cli.output import JsonOption, SetOption, config_epilog, emit
from minigpt.core.config import load_config
from minigpt.core.errors import DataError, TrainingError
from minigpt.core.telemetry import configure_logging
from minigpt.data.config import DataConfig

if TYPE_CHECKING:
    from minigpt.core.artifact import Artifact
    from minigpt.data.loader import SampleLoader

app = typer.Typer()

RunOption = Annotated[
    Path, typer.Option("--run", metavar="DIR", help="A training run's directory.")
]


class Workers(StrEnum):
    """Where documents are read, cleaned and tokenized."""

    LOCAL = "local"
    RAY = "ray"


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
    on: Annotated[
        Workers,
        typer.Option(help="Who does the work: this process, or the Ray cluster it can reach."),
    ] = Workers.LOCAL,
    json: JsonOption = False,
) -> None:
    """Read, clean, deduplicate, split and tokenize text into a dataset artifact."""
    configure_logging(json=json)
    settings = load_config(DataConfig, config, overrides or [])
    from minigpt.data.prepare import check_spreads
    from minigpt.data.prepare import prepare as prepare_dataset

    if on is Workers.RAY:
        check_spreads(settings)  # before a cluster is looked for
        from minigpt.data.ray_prepare import RayWork

        with RayWork.connect() as work:
            artifact = prepare_dataset(settings, out, work)
    else:
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


@app.command(epilog="Example: minigpt data explain --run runs/tiny --step 100")
def explain(
    run: RunOption,
    step: Annotated[int, typer.Option(min=1, help="The step, as metrics.jsonl counts, from 1.")],
    characters: Annotated[int, typer.Option(min=0, help="Text to show of each.")] = 60,
    json: JsonOption = False,
) -> None:
    """Name the documents, conversations or answers that fed a step of a run."""
    configure_logging(json=json)
    from minigpt.data.explain import explain_step

    loader, micro_batches = _open_run(run)
    fed = list(explain_step(loader, step - 1, micro_batches=micro_batches, characters=characters))
    result = {"run": str(run), "step": step, "documents": [item._asdict() for item in fed]}

    def human() -> None:
        typer.echo(f"step {step}: {micro_batches} micro-batches of {loader.batch_size} rows")
        for item in fed:
            mark = "" if item.part == "text" else f"  {item.part}, {item.targets} targets"
            mark += "  skipped" if item.skipped else ""
            typer.echo(
                f"  {item.micro_batch}.{item.row}  {item.source}:{item.document}  "
                f"epoch {item.epoch}  tokens {item.start:,}-{item.stop:,} ({item.tokens:,})"
                f"{mark}  {item.text!r}"
            )

    emit(result, json=json, human=human)


@app.command(
    epilog="Examples: minigpt data skip --run runs/tiny --document data:17; "
    "minigpt data skip --run runs/tiny shows the list."
)
def skip(
    run: RunOption,
    step: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Skip the data of this step (from 1); may repeat."),
    ] = None,
    document: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:NUMBER", help="Skip a document as explain names it; may repeat."
        ),
    ] = None,
    everywhere: Annotated[
        bool, typer.Option(help="Skip documents of the same content in whatever dataset.")
    ] = False,
    reason: Annotated[str, typer.Option(help="Kept in the list.")] = "",
    json: JsonOption = False,
) -> None:
    """Remove steps' data or documents from the rest of a run for good, or show what is removed.

    Documents are skipped from the first step on that the run has not done yet. The run must not
    be running; its next start takes the list up.
    """
    from minigpt.data.skip_list import SKIP_FILE, SkipList

    loader, micro_batches = _open_run(run)
    skipped = loader.skip_list
    if step or document:
        with _not_running(run):
            skipped = SkipList.of_run(run, skipped)
            done = _steps_done(run, [number - 1 for number in step or []])
            size = micro_batches * loader.batch_size
            for name in document or []:
                entry = loader.document_entry(name, by_content=everywhere).replace(
                    since=done * size, reason=reason
                )
                skipped = skipped.with_document(entry)
            skipped = skipped.with_steps(
                [number - 1 for number in step or []], samples_per_step=size, reason=reason
            )
            skipped.write(run / SKIP_FILE)

    def human() -> None:
        for entry in skipped.documents:
            place = f"{entry.dataset} document {entry.document}" if entry.dataset else entry.sha256
            typer.echo(f"document  {place}  from sample {entry.since:,}  {entry.reason}")
        for part in skipped.samples:
            last = part.first + part.count - 1
            typer.echo(f"samples   {part.first:,} to {last:,}  {part.reason}")
        if not (skipped.documents or skipped.samples):
            typer.echo("nothing is skipped")

    emit(skipped.model_dump(mode="json"), json=json, human=human)


@contextmanager
def _not_running(run: Path) -> Iterator[None]:
    """Hold the run's directory as a training process does.

    Raises:
        TrainingError: A process is training in it.
    """
    descriptor = os.open(run, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise TrainingError(
            f"a process is training in {run}", remedy="stop it first; Ctrl-C saves"
        ) from None
    finally:
        os.close(descriptor)


def _steps_done(run: Path, steps: list[int]) -> int:
    """Return how many steps the run has done; refuse steps (from 0) that are in a checkpoint.

    Raises:
        DataError: A step's data is already in the weights that the run would go on from.
    """
    from minigpt.train.metrics import read_metrics
    from minigpt.train.run import CHECKPOINT_DIRECTORY, METRICS_FILE

    names = [path.name for path in (run / CHECKPOINT_DIRECTORY).glob("step-*[0-9]")]
    saved = max((int(name.removeprefix("step-")) for name in names), default=0)
    for step in steps:
        if step < saved:
            raise DataError(
                f"the checkpoint of step {saved} has learned the data of step {step + 1}",
                remedy=f"move the checkpoints of step {step + 1} and later out of {run} first",
            )
    return max((line["step"] for line in read_metrics(run / METRICS_FILE)), default=saved)


def _open_run(run: Path) -> tuple[SampleLoader, int]:
    """Return a run's loader and how many micro-batches a step has."""
    from minigpt.pipeline import open_run_loader

    config, loader = open_run_loader(run)
    assert isinstance(config.batch.tokens_per_step, int)
    return loader, config.batch.tokens_per_step // (loader.batch_size * loader.sequence_length)


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
