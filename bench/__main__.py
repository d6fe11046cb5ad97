"""`make bench`: a short form of every benchmark; each alone takes longer and says more.

Peers are compared where they are here: nanoGPT where MINIGPT_NANOGPT names a checkout, the
transformers Trainer where it is installed.
"""

from __future__ import annotations

import os
import subprocess
import sys

from bench.harness import ROOT


def main() -> None:
    checkout = os.environ.get("MINIGPT_NANOGPT", "")
    nanogpt = ["--nanogpt", checkout] if checkout else []
    commands = [
        ["bench.footprint", "--repeat", "3", "--steps", "15"],
        ["bench.train_throughput", "--rounds", "3", "--steps", "4", *nanogpt],
        ["bench.train_quality", "--minutes", "1", *nanogpt],
        ["bench.kernels", "--seconds", "0.2", "--rows", "1", "16", "--shapes", "4096x1024"],
        ["bench.kernels_attention", "--repeats", "10"],
        ["bench.engine_throughput"],
        ["bench.loader", "--rounds", "7"],
        ["bench.checkpoint", "--shapes", "13.8M", "--rounds", "2"],
        ["bench.cluster_simulator", "--steps", "100", "--repeat", "1"],
    ]
    failed = []
    for module, *arguments in commands:
        print(f"\n=== python -m {module} {' '.join(arguments)}", flush=True)
        done = subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT)
        if done.returncode:
            failed.append(module)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
