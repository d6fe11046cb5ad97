"""`minigpt doctor`: what the machine has, and what that means for training and serving."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
from dataclasses import asdict, dataclass
from typing import Any

import typer

from minigpt.cli.output import JsonOption, emit
from minigpt.core.machine import Machine, describe_machine
from minigpt.core.storage import home

app = typer.Typer()

GIB = 1 << 30
LIBRARIES = (
    "torch",
    "numpy",
    "safetensors",
    "tokenizers",
    "pydantic",
    "fastapi",
    "mlflow-skinny",
    "openai",
)
EXTRAS = {
    "datasets": "Hugging Face datasets as a source (extra `hub`)",
    "lm_eval": "lm-eval tasks in `minigpt evaluate` (extra `tasks`)",
    "tensorboard": "the TensorBoard tracker (extra `track`)",
    "wandb": "the W&B tracker (extra `track`)",
}


@dataclass(frozen=True)
class Finding:
    """One thing looked at: what was found and what follows from it."""

    name: str
    found: str
    meaning: str
    ok: bool = True


@app.command(epilog="Example: minigpt doctor --json")
def doctor(json: JsonOption = False) -> None:
    """Say what this machine has and what that means; exit 1 where something is missing."""
    findings = examine()
    result = {
        "ok": all(f.ok for f in findings),
        "findings": [asdict(f) for f in findings],
        "libraries": _versions(),
    }
    emit(result, json=json, human=lambda: _print(findings, result["libraries"]))
    if not result["ok"]:
        raise typer.Exit(1)


def examine() -> list[Finding]:
    """Look at everything that decides whether and how fast minigpt runs here."""
    machine = describe_machine()
    return [
        _python(),
        Finding("system", f"{machine.system}, {machine.architecture}", machine.processor),
        Finding("cores", str(machine.cores), "torch uses them all unless told otherwise"),
        _instructions(machine),
        _memory(machine),
        _gpu(),
        _compiler(machine),
        _kernels(),
        _disk(),
        *_extras(),
    ]


def _python() -> Finding:
    version = platform.python_version()
    ok = tuple(map(int, version.split(".")[:2])) >= (3, 11)
    return Finding("python", version, "fine" if ok else "3.11 or newer is needed", ok)


def _instructions(machine: Machine) -> Finding:
    if machine.fast_bfloat16:
        meaning = "bfloat16 runs in hardware: precision `auto` trains and serves in it"
    else:
        meaning = "no bfloat16 in hardware: precision `auto` means float32, which is slower"
    return Finding("instructions", ", ".join(machine.instruction_sets) or "baseline", meaning)


def _memory(machine: Machine) -> Finding:
    total, available = machine.memory_total / GIB, machine.memory_available / GIB
    # AdamW in fp32 keeps weights, gradients and two moments: 16 bytes a parameter.
    largest = machine.memory_available * 0.7 / 16 / 1e6
    return Finding(
        "memory",
        f"{total:.1f} GiB, {available:.1f} GiB available",
        f"estimate: trains up to about {largest:,.0f}M parameters, activations besides",
        ok=available >= 1,
    )


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("gpu", "none", "everything runs on the processor")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Finding("gpu", ", ".join(names), "used where a config says device: cuda")


def _compiler(machine: Machine) -> Finding:
    if machine.compiler is None:
        return Finding("compiler", "none", "training runs uncompiled, which is slower: install g++")
    return Finding("compiler", machine.compiler, "torch.compile can be used")


def _kernels() -> Finding:
    from minigpt.kernels.library import Kernels, find

    found = find()
    if isinstance(found, Kernels):
        levels = ", ".join(found.levels)
        return Finding("kernels", found.level, f"minigpt's own, for serving; runs here: {levels}")
    cost = "torch's operators multiply: those of a decode step take 1.3 to 2 times as long"
    return Finding("kernels", f"none: {found.reason}", f"{cost}; {found.remedy}")


def _disk() -> Finding:
    place = home()
    existing = next(path for path in (place, *place.parents) if path.exists())
    free = shutil.disk_usage(existing).free / GIB
    meaning = f"for artifacts and the registry under {place}"
    return Finding("disk", f"{free:.1f} GiB free", meaning, ok=free >= 1)


def _extras() -> list[Finding]:
    return [
        Finding(
            name, "present" if found else "absent", f"{'gives' if found else 'needed for'} {use}"
        )
        for name, use in EXTRAS.items()
        for found in (importlib.util.find_spec(name) is not None,)
    ]


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("minigpt", *LIBRARIES)}


def _print(findings: list[Finding], versions: Any) -> None:
    for finding in findings:
        mark = " " if finding.ok else "!"
        typer.echo(f"{mark} {finding.name:13} {finding.found}")
        typer.echo(f"  {'':13} {finding.meaning}")
    typer.echo("  libraries     " + ", ".join(f"{k} {v}" for k, v in versions.items()))
