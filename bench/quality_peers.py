"""One timed training run of a peer, in a process of its own: `python -m bench.quality_peers`.

Reads a JSON object of options from standard input, prints one of results as the last line.
Wall time runs from the process's start: imports, compiling and saving count for every peer.
Scoring comes after, and does not.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from minigpt.core.artifact import open_artifact  # noqa: E402
from minigpt.core.config import load_config  # noqa: E402
from minigpt.core.machine import usable_cores  # noqa: E402
from minigpt.data.loader import Batch, BatchLoader  # noqa: E402
from minigpt.data.shards import TokenDataset  # noqa: E402
from minigpt.data.tokenizer import Tokenizer  # noqa: E402

# config/train_shakespeare_char.py, and the README's command for "only a macbook".
NANOGPT_RECIPES: dict[str, dict[str, Any]] = {
    "char": {"layers": 6, "heads": 6, "width": 384, "block": 256, "batch": 64, "dropout": 0.2},
    "readme": {"layers": 4, "heads": 4, "width": 128, "block": 64, "batch": 12, "dropout": 0.0},
}
_LR, _MIN_LR, _WARMUP, _BETAS, _DECAY = 1e-3, 1e-4, 100, (0.9, 0.99), 0.1


def main() -> None:
    options = json.load(sys.stdin)
    results = sys.stdout
    sys.stdout = sys.stderr
    peers: dict[str, Callable[..., dict[str, Any]]] = {"minigpt": minigpt, "nanogpt": nanogpt}
    run = peers[options.pop("peer")]
    print(json.dumps(run(**options)), file=results)


def minigpt(*, dataset: str, recipe: str, overrides: list[str], minutes: float) -> dict[str, Any]:
    """`minigpt train` on a recipe, with what its budget leaves after the imports."""
    from minigpt.model.attention import CausalAttention
    from minigpt.model.weights import load_model
    from minigpt.train.config import TrainConfig
    from minigpt.train.metrics import read_metrics
    from minigpt.train.run import METRICS_FILE, train

    imported = time.perf_counter() - STARTED
    config = load_config(
        TrainConfig,
        recipe,
        [
            f"data={dataset}",
            f"minutes={minutes - imported / 60}",
            "trackers.mlflow=false",
            "validation.every=0",
            "validation.sample_tokens=0",
            "checkpoint.every=0",
            *overrides,
        ],
    )
    with tempfile.TemporaryDirectory() as scratch:
        run_dir = Path(scratch) / "run"
        artifact = train(config, open_artifact(dataset), run_dir)
        seconds = time.perf_counter() - STARTED
        final = json.loads((run_dir / "final.json").read_text())
        steps = list(read_metrics(run_dir / METRICS_FILE))
        model = load_model(artifact.path).model
    length = model.config.context_length

    def score(batch: Batch) -> Tensor:
        hidden = model(batch.tokens, batch.positions, CausalAttention(batch.documents))
        return model.logits(hidden)

    return {
        "seconds": seconds,
        "steps": final["steps"],
        "tokens": steps[-1]["tokens"],
        "training_seconds": sum(line["seconds"] for line in steps),
        "parameters": sum(p.numel() for p in model.parameters()),
        "bits_per_byte": held_out_bits_per_byte(score, dataset, length),
    }


def nanogpt(*, dataset: str, checkout: str, recipe: str, minutes: float) -> dict[str, Any]:
    """nanoGPT's model and recipe, compiled, bf16; its cosine runs over the time that is left."""
    sys.path.insert(0, checkout)
    from model import GPT, GPTConfig  # type: ignore[import-not-found]

    shape = NANOGPT_RECIPES[recipe]
    torch.set_num_threads(usable_cores())
    torch.manual_seed(1337)
    tokenizer = Tokenizer.load(TokenDataset.open(dataset, "train").tokenizer_dir)
    config = GPTConfig(
        block_size=shape["block"],
        vocab_size=tokenizer.vocab_size,
        n_layer=shape["layers"],
        n_head=shape["heads"],
        n_embd=shape["width"],
        dropout=shape["dropout"],
        bias=False,
    )
    model = GPT(config)
    optimizer = model.configure_optimizers(_DECAY, _LR, _BETAS, "cpu")
    compiled = torch.compile(model)
    batches = _random_windows(dataset, shape["batch"], shape["block"])
    deadline = STARTED + 60 * minutes
    step, began, training_seconds = 0, 0.0, 0.0
    while True:
        begin = time.perf_counter()
        left = max(0.0, deadline - begin)
        progress = 1 - left / (deadline - began) if step else 0.0
        if step and begin + training_seconds / step > deadline:
            break
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        rate = _MIN_LR + cosine * (_LR - _MIN_LR) if step >= _WARMUP else _LR * (step + 1) / _WARMUP
        for group in optimizer.param_groups:
            group["lr"] = rate
        inputs, targets = next(batches)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            _, loss = compiled(inputs, targets)  # type: ignore[no-untyped-call]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step == 1:
            began = time.perf_counter()  # compiled
        else:
            training_seconds += time.perf_counter() - begin
    seconds = time.perf_counter() - STARTED
    model.eval()

    def score(batch: Batch) -> Tensor:
        logits, _ = model(batch.tokens, batch.targets)
        result: Tensor = logits
        return result

    return {
        "seconds": seconds,
        "steps": step,
        "tokens": step * shape["batch"] * shape["block"],
        "training_seconds": training_seconds,
        "parameters": sum(p.numel() for p in model.parameters()),
        "bits_per_byte": held_out_bits_per_byte(score, dataset, shape["block"]),
    }


def _random_windows(dataset: str, batch: int, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """As nanoGPT's get_batch: windows at random places of the token stream."""
    split = TokenDataset.open(dataset, "train")
    stream = np.array(split.tokens(0, split.num_tokens), dtype=np.int64)
    while True:
        starts = torch.randint(len(stream) - length, (batch,)).tolist()
        rows = torch.stack([torch.from_numpy(stream[i : i + length + 1]) for i in starts])
        yield rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


@torch.inference_mode()
def held_out_bits_per_byte(score: Callable[[Batch], Tensor], dataset: str, length: int) -> float:
    """Score the held-out stream in windows of `length` side by side, in float32.

    Every target counts, end-of-text tokens too (they are no bytes); the same for every peer.
    """
    split = TokenDataset.open(dataset, "val")
    lengths = torch.from_numpy(Tokenizer.load(split.tokenizer_dir).byte_lengths())
    loader = BatchLoader(split, batch_size=1, sequence_length=length, seed=0)
    windows, rows = loader.num_rows, max(1, 4096 // length)
    nats, count = 0.0, 0
    for first in range(0, windows, rows):
        loader.batch_size = min(rows, windows - first)
        batch = loader.batch_at(first)
        logits = score(batch).flatten(0, 1).float()
        targets = batch.targets.flatten()
        nats += float(F.cross_entropy(logits, targets, reduction="sum"))
        count += int(lengths[targets].sum())
    return nats / math.log(2) / count


if __name__ == "__main__":
    main()
