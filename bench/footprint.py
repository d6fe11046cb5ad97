"""What minigpt costs besides the work: imports, start-up, resident memory, checkpoint stalls.

- Time of `minigpt --version` and of imports, each in fresh processes.
- A 13.8M-parameter training run with a checkpoint every few steps: memory before the first
  step and at its peak, and the pause of a save beside the time of a step.
- `minigpt serve` on a 124M model of random weights: seconds from the command to /ready, and
  the resident memory of its processes then.

Run it as `python -m bench.footprint`.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.harness import (
    ROOT,
    environment,
    print_environment,
    print_table,
    spread,
    write_results,
)
from bench.serving.peers import minigpt, running

MINIGPT = [sys.executable, "-m", "minigpt"]
COMMANDS = {
    "minigpt --version": [*MINIGPT, "--version"],
    "import torch": [sys.executable, "-c", "import torch"],
    "import minigpt.train.run": [sys.executable, "-c", "import minigpt.train.run"],
    "import minigpt.engine.engine": [sys.executable, "-c", "import minigpt.engine.engine"],
}
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=5, help="runs of each short command")
    parser.add_argument("--steps", type=int, default=40, help="steps of the training run")
    arguments = parser.parse_args()
    described = environment()
    print_environment(described)
    results: dict[str, Any] = {"environment": described}
    results["seconds"] = measure_commands(arguments.repeat)
    with tempfile.TemporaryDirectory() as scratch:
        results["train"] = measure_training(Path(scratch), arguments.steps)
        results["serve"] = measure_serving(Path(scratch), repeat=3)
    write_results("footprint", results)


def measure_commands(repeat: int) -> dict[str, list[float]]:
    """Time each command `repeat` times in turn; the first, which fills caches, is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(repeat + 1):
        for name, command in COMMANDS.items():
            begin = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - begin)
    print()
    rows = [[name, spread(taken[1:])] for name, taken in seconds.items()]
    print_table(("command", "seconds: median (least-largest)"), rows)
    return {name: taken[1:] for name, taken in seconds.items()}


def measure_training(scratch: Path, steps: int) -> dict[str, Any]:
    """Train the 13.8M shape in a child process; read its memory and its metrics."""
    program = "import sys; from bench.footprint import train_child; train_child(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", program, str(scratch), str(steps)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    measured = dict(json.loads(done.stdout.splitlines()[-1]))
    from minigpt.train.metrics import read_metrics
    from minigpt.train.run import METRICS_FILE
    from minigpt.train.sessions import EVENTS_FILE

    run_dir = scratch / "run"
    step = statistics.median(line["seconds"] for line in read_metrics(run_dir / METRICS_FILE))
    events = read_metrics(run_dir / EVENTS_FILE)
    saves = [line["stall_seconds"] for line in events if line["kind"] == "checkpoint"]
    measured |= {"step_seconds": step, "stall_seconds": saves}
    print(
        f"\ntraining 13.8M parameters: resident {measured['start_mib']:.0f} MiB at start, ", end=""
    )
    print(f"{measured['peak_mib']:.0f} MiB at the peak")
    share = statistics.median(saves) / step
    print(f"checkpoint: {spread(saves)} s of stall, {share:.2f} of a step of {step:.3f} s")
    return measured


def train_child(arguments: list[str]) -> None:
    """Run in the measured process: train on a little of the standard library's source."""
    from minigpt.core.config import from_mapping
    from minigpt.data.config import DataConfig
    from minigpt.data.prepare import prepare
    from minigpt.train.config import TrainConfig
    from minigpt.train.run import train

    scratch, steps = Path(arguments[0]), int(arguments[1])
    start = _resident_mib()
    data = {"source": {"kind": "pystdlib"}, "tokenizer": {"kind": "bytes"}, "max_bytes": 2_000_000}
    dataset = prepare(from_mapping(DataConfig, data), scratch / "dataset")
    recipe = {
        "data": str(dataset.path),
        "size": 6,
        "model": {"vocab_size": 8192},
        "steps": steps,
        "batch": {"sequence_length": 256, "tokens_per_step": 4096},
        "optimizer": {"kind": "adamw"},
        "checkpoint": {"every": 5},
        "validation": {"every": 0, "tokens": 4096, "sample_tokens": 0},
        "trackers": {"mlflow": False},
        "compile": True,
    }
    stdout, sys.stdout = sys.stdout, sys.stderr
    train(from_mapping(TrainConfig, recipe), dataset, scratch / "run")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB
    print(json.dumps({"start_mib": start, "peak_mib": peak}), file=stdout)


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / MIB


def measure_serving(scratch: Path, repeat: int) -> dict[str, Any]:
    """Start `minigpt serve` on a random 124M model until /ready answers 200."""
    import psutil

    model = scratch / "124M"
    write_random_model(model, scratch / "dataset" / "tokenizer")
    seconds, memory = [], []
    for _ in range(repeat):
        with running(minigpt(model), scratch / "serve.log", timeout=120) as started:
            seconds.append(started.seconds)
            process = psutil.Process(started.pid)
            family = [process, *process.children(recursive=True)]
            memory.append(sum(member.memory_info().rss for member in family) / MIB)
    shutil.rmtree(model)
    print(f"\nserve, 124M parameters: ready after {spread(seconds)} s; goal under 5")
    print(f"resident memory of its processes: {spread(memory)} MiB")
    return {"ready_seconds": seconds, "resident_mib": memory}


def write_random_model(directory: Path, tokenizer: Path) -> None:
    """Write a Qwen3-shaped model of GPT-2's small size with random bf16 weights.

    The byte tokenizer is filled up with tokens that no text contains.
    """
    import torch

    from minigpt.model.config import ModelConfig
    from minigpt.model.decoder import Decoder
    from minigpt.model.weights import save_model

    vocab_size = 50304
    tokenizer = shutil.copytree(tokenizer, directory.with_name("tokenizer-124M"))
    description = json.loads((tokenizer / "tokenizer.json").read_text())
    vocabulary = description["model"]["vocab"]
    taken = len(vocabulary) + len(description["added_tokens"])
    for number in range(taken, vocab_size):
        vocabulary[f"unused {number}"] = number
    (tokenizer / "tokenizer.json").write_text(json.dumps(description))
    config = ModelConfig(
        vocab_size=vocab_size,
        num_layers=12,
        hidden_size=768,
        num_heads=12,
        num_kv_heads=12,
        head_dim=64,
        intermediate_size=2048,
        context_length=1024,
    )
    model = Decoder(config)
    model.init_weights(torch.Generator().manual_seed(0))
    save_model(directory, model.bfloat16(), config, tokenizer)


if __name__ == "__main__":
    main()
