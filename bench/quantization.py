"""What each quantized format costs and gains: bits per byte, bytes and decode speed, as served.

Every format is made from one model by `minigpt compress` and runs in bfloat16 through the engine,
whose kernels serve on a CPU: the same code, weights and rounding that answers come from. Quality
is the likelihood of a dataset's held-out documents, read as prompts; speed are decode steps, the
engines in turns. Without `--data` only bytes and speed are measured, which random weights tell.

Formulas: bits per byte = sum of the windows' NLL / ln 2 / bytes of their targets; the change is
against bf16 on the same windows, +- 1.96 standard errors of the paired differences. Tokens/s are
medians of the turns, ratios medians of the turns' ratios (smallest-largest).

Run it as `python -m bench.quantization runs/shakespeare/model --data DATASET`.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bench.harness import environment, print_environment, print_table, write_results
from minigpt.compress.config import CompressConfig
from minigpt.compress.quantize import quantize
from minigpt.compress.speed import compare_decode_speed
from minigpt.core.config import from_mapping
from minigpt.core.machine import usable_cores
from minigpt.data.shards import TokenDataset
from minigpt.data.tokenizer import Tokenizer
from minigpt.engine.config import EngineConfig
from minigpt.engine.engine import Engine
from minigpt.engine.llm import LLM
from minigpt.model.weights import load_model


class Format(NamedTuple):
    """How weights are kept, and to what the kernels round activations."""

    name: str
    compress: dict[str, Any] | None
    activation_bits: int = 16


FORMATS = (
    Format("bf16", None),
    Format("int8", {"method": "int8"}),
    Format("int8, activations of 8 bits (W8A8)", {"method": "int8"}, 8),
    Format("int4, groups of 32", {"method": "int4", "group_size": 32}),
    Format("int4, groups of 64", {"method": "int4", "group_size": 64}),
    Format("int4, groups of 128", {"method": "int4", "group_size": 128}),
    Format("int4, groups of 32, activations of 8 bits", {"method": "int4", "group_size": 32}, 8),
)


def main() -> None:
    arguments = parse_arguments()
    described = environment()
    print_environment(described)
    with tempfile.TemporaryDirectory() as scratch:
        paths = [make(form, arguments.model, Path(scratch)) for form in FORMATS]
        quality = None
        if arguments.data is not None:
            quality = [
                bits_per_byte(path, form, arguments)
                for path, form in zip(paths, FORMATS, strict=True)
            ]
        speeds = decode_speeds(paths, arguments)
        rows = [
            row(form, path, quality, speeds, index)
            for index, (form, path) in enumerate(zip(FORMATS, paths, strict=True))
        ]
    print_table(tuple(rows[0]), [tuple(each.values()) for each in rows])
    write_results(
        "quantization",
        {"environment": described, "settings": vars(arguments), "rows": rows, "speeds": speeds},
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a floating-point model")
    parser.add_argument("--data", type=Path, help="a dataset of the model's tokenizer")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--repeats", type=int, default=7, help="timings of each format")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a timing")
    return parser.parse_args()


def make(form: Format, model: Path, scratch: Path) -> Path:
    """Return the model in a format's weights."""
    if form.compress is None:
        return model
    config = from_mapping(CompressConfig, form.compress)
    path = scratch / "-".join(map(str, form.compress.values()))
    return path if path.exists() else quantize(model, path, config).path


def engine_config(form: Format, threads: int) -> EngineConfig:
    settings = {
        "dtype": "bfloat16",
        "threads": threads,
        "activation_bits": form.activation_bits,
        "max_num_seqs": 8,
        "prefix_cache": False,
        "speculative": {"method": "none"},
    }
    return from_mapping(EngineConfig, settings)


class Quality(NamedTuple):
    """Of one window each."""

    nats: npt.NDArray[np.float64]
    bytes: npt.NDArray[np.int64]


def bits_per_byte(path: Path, form: Format, arguments: argparse.Namespace) -> Quality:
    """Score the held-out documents, cut into windows of the engine's context."""
    split = TokenDataset.open(arguments.data, "val")
    lengths = Tokenizer.load(path).byte_lengths()
    engine = Engine.load(path, engine_config(form, arguments.threads))
    width = engine.ready().context_length
    windows: list[list[int]] = []
    for number in range(split.num_documents):
        document = split.document(number).tolist()
        starts = range(0, len(document) - 1, width - 1)
        windows += [document[start : start + width] for start in starts]
    with LLM(engine) as llm:
        scores = llm.score(windows, progress=False)
    nats = np.array([-math.fsum(token.logprob for token in each) for each in scores])
    return Quality(nats, np.array([int(lengths[each[1:]].sum()) for each in windows]))


def decode_speeds(paths: list[Path], arguments: argparse.Namespace) -> list[list[float]]:
    engines = [
        Engine.load(path, engine_config(form, arguments.threads))
        for path, form in zip(paths, FORMATS, strict=True)
    ]
    limit = engines[0].ready().context_length
    prompt = list(range(1, min(32, limit // 2)))
    return compare_decode_speed(
        engines, prompt, repeats=arguments.repeats,
        tokens=min(arguments.tokens, limit - len(prompt)), batch=1,
    )  # fmt: skip


def row(
    form: Format, path: Path, quality: list[Quality] | None, speeds: list[list[float]], index: int
) -> dict[str, str]:
    """Return a line of the table."""
    state = load_model(path, dtype="bfloat16", verify=False).model.state_dict()
    found = {"format": form.name, "MB": f"{sum(t.nbytes for t in state.values()) / 1e6:.2f}"}
    if quality is not None:
        bits = math.log(2) * quality[0].bytes.sum()
        found["bits per byte"] = f"{quality[index].nats.sum() / bits:.4f}"
        change = quality[index].nats - quality[0].nats
        error = 1.96 * change.std() * math.sqrt(len(change)) / bits
        found["change"] = f"{change.sum() / bits:+.4f} +- {error:.4f}"
    ratios = [ours / base for ours, base in zip(speeds[index], speeds[0], strict=True)]
    found["tokens/s"] = f"{statistics.median(speeds[index]):.0f}"
    found["of bf16"] = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
    return found


if __name__ == "__main__":
    main()
