"""Whether a model fits this machine, and how much fits beside it: known before anything is loaded.

From `config.json` and the headers of the weight files, in a fraction of a second; no torch here.
"""

from __future__ import annotations

import importlib.util
import json
import runpy
from dataclasses import dataclass
from pathlib import Path

from minigpt.core.errors import ModelError
from minigpt.core.machine import describe_machine, free_gpu_memory
from minigpt.engine.config import EngineConfig
from minigpt.engine.resolve import (
    DTYPE_BYTES,
    Report,
    kv_bytes_per_token,
    resolve_memory,
    resolve_numerics,
)
from minigpt.model.config import ModelConfig
from minigpt.model.hf import config_from_hf
from minigpt.model.tensor_headers import TensorHeader, read_headers, weight_files


@dataclass(frozen=True)
class Preflight:
    """Estimates of what serving a model takes; bytes unless said."""

    device: str
    dtype: str
    available_bytes: int
    """Free memory of the device."""
    weight_bytes: int
    kv_bytes_per_token: int
    kv_cache_bytes: int
    max_concurrent_tokens: int
    """Prompt and answer tokens of all running sequences together."""
    context_length: int


def preflight(path: Path, config: EngineConfig, *, report: Report) -> Preflight:
    """Plan memory for serving a model on this machine.

    Args:
        path: A local model artifact or Hugging Face directory.
        config: "auto" values are settled as the engine will settle them.
        report: Where the derivation goes.

    Raises:
        ModelError: No usable model there, or its weights do not fit: with the shortfall.
        ConfigError: The cache can't hold one context, with the shortfall, or no such device.
    """
    machine = describe_machine()
    gpu_memory = free_gpu_memory() if _torch_has_cuda() else None
    config = resolve_numerics(config, machine, cuda=gpu_memory is not None, report=report)
    on_gpu = config.device == "cuda" and gpu_memory is not None
    available = gpu_memory if on_gpu and gpu_memory is not None else machine.memory_available
    return plan_memory(path, config, available=available, report=report)


def plan_memory(path: Path, config: EngineConfig, *, available: int, report: Report) -> Preflight:
    """As `preflight`, for a config with numerics settled and `available` bytes on the device."""
    model = read_model_config(path)
    weights = weight_bytes(read_headers(weight_files(path)), config, model)
    draft = None
    if config.speculative.draft_model is not None:
        draft_path = Path(config.speculative.draft_model)
        draft = read_model_config(draft_path)
        weights += weight_bytes(read_headers(weight_files(draft_path)), config, draft)
    if config.speculative.draft_heads is not None:
        heads = read_headers(weight_files(Path(config.speculative.draft_heads)))
        elements = sum(header.count for header in heads)
        elements += (config.speculative.draft_vocabulary or 0) * model.hidden_size
        weights += elements * DTYPE_BYTES[config.dtype]
    if weights > available:
        raise ModelError(
            f"{path} takes {weights} bytes of weights in {config.dtype}, {available} are free: "
            f"short by {weights - available} bytes",
            remedy="free memory, quantize the model or use a larger machine",
        )
    config = resolve_memory(
        config, model, available=available - weights, report=report, draft=draft
    )
    assert config.kv_cache_bytes != "auto"
    assert config.context_length != "auto"
    per_token = kv_bytes_per_token(config, model, draft)
    return Preflight(
        device=config.device,
        dtype=config.dtype,
        available_bytes=available,
        weight_bytes=weights,
        kv_bytes_per_token=per_token,
        kv_cache_bytes=config.kv_cache_bytes,
        max_concurrent_tokens=config.kv_cache_bytes // per_token,
        context_length=config.context_length,
    )


def read_model_config(path: Path) -> ModelConfig:
    """Read the architecture from a directory's `config.json`.

    Raises:
        ModelError: Missing, malformed or of an unsupported architecture.
    """
    file = path / "config.json"
    try:
        tree = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(
            f"no model at {path}: can't read config.json: {error}",
            remedy="give a model artifact or a Hugging Face directory",
        ) from None
    if not isinstance(tree, dict):
        raise ModelError(f"{file} holds a {type(tree).__name__}, not an object")
    return config_from_hf(tree)


def weight_bytes(headers: list[TensorHeader], config: EngineConfig, model: ModelConfig) -> int:
    """Return what stored tensors take once loaded: floating ones are converted, int8 are not."""
    assert config.dtype != "auto"
    width = DTYPE_BYTES[config.dtype]
    total = sum(h.count * width if h.is_floating else h.num_bytes for h in headers)
    if model.tie_embeddings and config.device == "cpu" and config.dtype == "bfloat16":
        # The output projection gets a packed copy of its own; see `packing`.
        total += model.vocab_size * model.hidden_size * width
    return total


def _torch_has_cuda() -> bool:
    """Whether the installed torch is built for CUDA, without importing it."""
    found = importlib.util.find_spec("torch")
    if found is None or not found.submodule_search_locations:
        return False
    version = Path(found.submodule_search_locations[0]) / "version.py"
    return runpy.run_path(str(version)).get("cuda") is not None
