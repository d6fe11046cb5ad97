"""Training quality per minute: held-out bits per byte of minigpt and nanoGPT after equal time.

Both get the same tokenizer, the same tokens and the same cores. nanoGPT trains for the whole
budget by each of its two recipes that fit (`config/train_shakespeare_char.py`; the README's
command for small machines), compiled and in bf16, which its own train.py does not do on a CPU;
the better one counts. minigpt trains by its recipe for half the budget, and for all of it.

Wall time runs from a process's start with an empty compiler cache. Each finished run is kept in
bench/results/quality and not repeated while the code that it ran is the same.

Run it as `python -m bench.train_quality --nanogpt PATH-OF-ITS-CHECKOUT`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.harness import (
    RESULTS,
    ROOT,
    SHARED_DATA,
    environment,
    print_environment,
    print_table,
    write_results,
)

CORPORA = {"shakespeare": "recipes/shakespeare.yaml", "pystdlib": "recipes/pystdlib.yaml"}


def main() -> None:
    arguments = parse_arguments()
    described = environment()
    print_environment(described)
    results: dict[str, Any] = {"environment": described, "minutes": arguments.minutes}
    for corpus in arguments.corpora.split(","):
        dataset = prepare_corpus(corpus)
        if dataset is None:
            continue
        runs = {
            name: run_once(corpus, name, options)
            for name, options in plan(arguments, corpus, dataset).items()
        }
        results[corpus] = runs | {"goal": report(corpus, runs, arguments.minutes)}
    write_results("train_quality", results)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nanogpt", type=Path, help="checkout of karpathy/nanoGPT")
    parser.add_argument("--minutes", type=float, default=5.0, help="the budget (default 5)")
    parser.add_argument("--corpora", default=",".join(CORPORA), help="comma-separated")
    parser.add_argument(
        "--nanogpt-recipes", default="readme,char", help="which of its recipes (readme,char)"
    )
    parser.add_argument(
        "--shares", default="0.5,1", help="of the budget, a minigpt run for each (default 0.5,1)"
    )
    parser.add_argument(
        "--set", action="append", default=[], help="override of minigpt's recipe, may be repeated"
    )
    return parser.parse_args()


def prepare_corpus(corpus: str) -> Path | None:
    """Make the corpus's dataset artifact, or return the one that is there."""
    from minigpt.core.config import load_config
    from minigpt.data.config import DataConfig
    from minigpt.data.prepare import prepare

    destination = RESULTS / "quality" / "data" / corpus
    if destination.is_dir():
        return destination
    if corpus == "pystdlib":
        return Path(
            prepare(load_config(DataConfig, ROOT / "recipes/data/pystdlib.yaml"), destination).path
        )
    source = SHARED_DATA / "tinyshakespeare.txt"
    if not source.is_file():
        print(f"{corpus} skipped: no {source}")
        return None
    text = source.read_text()
    cut = len(text) * 9 // 10
    with tempfile.TemporaryDirectory() as scratch:
        parts = {"train": text[:cut], "val": text[cut:]}
        for name, part in parts.items():
            (Path(scratch) / f"{name}.txt").write_text(part)
        sources = {n: {"kind": "text", "paths": [f"{scratch}/{n}.txt"]} for n in parts}
        config = DataConfig.model_validate(
            {
                "source": sources["train"],
                "val_source": sources["val"],
                "clean": {"near_duplicates": None, "max_duplicate_lines": 1.0},
                "tokenizer": {"kind": "bytes"},
            }
        )
        return Path(prepare(config, destination).path)


def plan(arguments: argparse.Namespace, corpus: str, dataset: Path) -> dict[str, dict[str, Any]]:
    """Name to options of each run."""
    minutes = arguments.minutes
    ours = {
        "peer": "minigpt",
        "dataset": str(dataset),
        "recipe": str(ROOT / CORPORA[corpus]),
        "overrides": arguments.set,
    }
    runs: dict[str, dict[str, Any]] = {}
    if arguments.nanogpt and (arguments.nanogpt / "model.py").is_file():
        for recipe in arguments.nanogpt_recipes.split(","):
            runs[f"nanoGPT {recipe}, {minutes:g} min"] = {
                "peer": "nanogpt",
                "dataset": str(dataset),
                "checkout": str(arguments.nanogpt),
                "recipe": recipe,
                "minutes": minutes,
            }
    else:
        print("nanoGPT skipped: --nanogpt names no checkout")
    for share in map(float, arguments.shares.split(",")):
        runs[f"minigpt, {share * minutes:g} min"] = ours | {"minutes": share * minutes}
    return runs


def run_once(corpus: str, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Run a peer in a fresh process with an empty compiler cache, or return the kept result."""
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    for path in code_files(options):
        digest.update(path.read_bytes())
    kept = RESULTS / "quality" / f"{corpus}-{digest.hexdigest()[:16]}.json"
    if kept.is_file():
        print(f"{corpus}: {name}: kept from an earlier call ({kept.name})")
        return dict(json.loads(kept.read_text()))
    print(f"{corpus}: {name} ...", flush=True)
    with tempfile.TemporaryDirectory() as cache:
        finished = subprocess.run(
            [sys.executable, "-m", "bench.quality_peers"],
            input=json.dumps(options),
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache},
        )
    if finished.returncode:
        raise SystemExit(f"{name} failed with exit code {finished.returncode}, see above")
    result = dict(json.loads(finished.stdout.splitlines()[-1]))
    result["load_average"] = os.getloadavg()
    kept.write_text(json.dumps(result, indent=2))
    return result


def code_files(options: dict[str, Any]) -> list[Path]:
    """Return the files that decide a run's result."""
    dataset = Path(options["dataset"]) / "manifest.json"
    shared = [Path(__file__).with_name("quality_peers.py"), dataset]
    if options["peer"] == "nanogpt":
        return [*shared, Path(options["checkout"]) / "model.py"]
    packages = ("core", "data", "model", "train", "evaluate")
    sources = [p for name in packages for p in sorted((ROOT / "src/minigpt" / name).rglob("*.py"))]
    return [*shared, Path(options["recipe"]), *sources]


def report(corpus: str, runs: dict[str, Any], minutes: float) -> dict[str, Any]:
    """Print the corpus's table and the goal's verdict."""
    rows = [
        [
            name,
            f"{run['parameters'] / 1e6:.2f}M",
            f"{run['seconds']:.0f}",
            f"{run['seconds'] - run['training_seconds']:.0f}",
            f"{run['steps']:,}",
            f"{run['tokens'] / 1e6:.2f}M",
            f"{run['bits_per_byte']:.4f}",
        ]
        for name, run in runs.items()
    ]
    print(f"\n{corpus}: held-out bits per byte")
    header = ("peer", "parameters", "wall s", "of it not steps", "steps", "tokens", "bits/byte")
    print_table(header, rows)
    theirs = {n: r["bits_per_byte"] for n, r in runs.items() if n.startswith("nanoGPT")}
    half = runs[f"minigpt, {minutes / 2:g} min"]["bits_per_byte"]
    if not theirs:
        return {"minigpt_half_time": half}
    best = min(theirs, key=lambda name: theirs[name])
    verdict = "reached" if half <= theirs[best] else "missed"
    print(f"minigpt in half the time {half:.4f}, {best} {theirs[best]:.4f}: goal {verdict}\n")
    return {"minigpt_half_time": half, "best_peer": best, "best_peer_value": theirs[best]}


if __name__ == "__main__":
    main()
