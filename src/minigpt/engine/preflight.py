"""Whether a model fits this machine, and how much fits beside it: known before anything is loaded.

From `config.json` and the headers of the weight files, in a fraction of a second; no torch here.
"""

from __future__ import annotations

import importlib.util
import json
import runpy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minigpt.core.errors import ModelError
from minigpt.core.machine import describe_machine, free_gpu_memory
from minigpt.engine.config import EngineConfig
from minigpt.engine.resolve import (
    DTYPE_BYTES,
    Report,
    activation_bits,
    check_activation_bits,
    check_kv_cache_dtype,
    kv_bytes_per_token,
    kv_cache_dtype,
    resolve_memory,
    resolve_numerics,
)
from minigpt.model.config import ModelConfig
from minigpt.model.hf import config_from_hf, is_quantized
from minigpt.model.sharding import Shard, check_ranks, cut_axis
from minigpt.model.tensor_headers import TensorHeader, read_headers, weight_files
from minigpt.model.tensor_origins import find_origin


@dataclass(frozen=True)
class Preflight:
    """Estimates of what serving a model takes; bytes unless said, and of each rank."""

    device: str
    dtype: str
    activation_bits: int
    """Of the inputs of integer weights, where the kernels serve."""
    available_bytes: int
    """Free memory of the device."""
    weight_bytes: int
    kv_cache_dtype: str
    """What keys and values are kept in."""
    kv_bytes_per_token: int
    kv_cache_bytes: int
    max_concurrent_tokens: int
    """Prompt and answer tokens of all running sequences together."""
    context_length: int
    tensor_parallel_size: int
    """Ranks that compute it together."""


def preflight(path: Path, config: EngineConfig, *, report: Report) -> Preflight:
    """Plan memory for serving a model on this machine.

    Args:
        path: A local model artifact or Hugging Face directory.
        config: "auto" values are settled as the engine will settle them.
        report: Where the derivation goes.

    Raises:
        ModelError: No usable model there, or its weights do not fit: with the shortfall.
        ConfigError: The cache can't hold one context, with the shortfall; torch would serve and
            has no such cache; no such device; or the model can't be cut among so many ranks.
    """
    machine = describe_machine()
    gpu_memory = free_gpu_memory() if _torch_has_cuda() else None
    config = resolve_numerics(config, machine, cuda=gpu_memory is not None, report=report)
    on_gpu = config.device == "cuda" and gpu_memory is not None
    share = machine.memory_available // config.tensor_parallel_size
    available = gpu_memory if on_gpu and gpu_memory is not None else share
    return plan_memory(path, config, available=available, report=report)


def plan_memory(path: Path, config: EngineConfig, *, available: int, report: Report) -> Preflight:
    """As `preflight`, for a config with numerics settled and `available` bytes for each rank."""
    model = read_model_config(path)
    check_ranks(model, config.tensor_parallel_size)
    headers = read_headers(weight_files(path))
    weights = rank_weight_bytes(path, headers, config, model)
    bits, torch_serves = activation_bits(config), _torch_serves(config)
    quantized = not all(header.is_floating for header in headers)
    check_activation_bits(bits, quantized=quantized, torch_serves=torch_serves)
    cache_format = kv_cache_dtype(config)
    check_kv_cache_dtype(cache_format, config.dtype, torch_serves=torch_serves)
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
        each = "" if config.tensor_parallel_size == 1 else ", on each rank"
        raise ModelError(
            f"{path} takes {weights} bytes of weights in {config.dtype}, {available} are free: "
            f"short by {weights - available} bytes{each}",
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
        activation_bits=bits,
        available_bytes=available,
        weight_bytes=weights,
        kv_cache_dtype=cache_format,
        kv_bytes_per_token=per_token,
        kv_cache_bytes=config.kv_cache_bytes,
        max_concurrent_tokens=config.kv_cache_bytes // per_token,
        context_length=config.context_length,
        tensor_parallel_size=config.tensor_parallel_size,
    )


def read_model_config(path: Path) -> ModelConfig:
    """Read the architecture from a directory's `config.json`.

    Raises:
        ModelError: Missing, malformed or of an unsupported architecture.
    """
    return config_from_hf(_read_tree(path))


def _read_tree(path: Path) -> dict[str, Any]:
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
    return tree


def weight_bytes(headers: list[TensorHeader], config: EngineConfig, model: ModelConfig) -> int:
    """Return what stored tensors take once loaded: floating ones are converted, integers not."""
    assert config.dtype != "auto"
    width = DTYPE_BYTES[config.dtype]
    total = sum(h.count * width if h.is_floating else h.num_bytes for h in headers)
    if model.tie_embeddings and config.device == "cpu" and config.dtype == "bfloat16":
        # The output projection gets a packed copy of its own; see `packing` and `native`.
        quantized = any(not header.is_floating for header in headers)
        total += model.vocab_size * model.hidden_size * (1 if quantized else width)
    return total


def rank_weight_bytes(
    path: Path, headers: list[TensorHeader], config: EngineConfig, model: ModelConfig
) -> int:
    """Return the bytes of weights of the rank that holds most of them, once loaded."""
    ranks = config.tensor_parallel_size
    if ranks == 1:
        return weight_bytes(headers, config, model)
    tree = _read_tree(path)
    family = "" if is_quantized(tree) else str(tree["model_type"])
    last = Shard(ranks - 1, ranks)  # whose part of an uneven vocabulary is the largest
    parts = [part for header in headers if (part := _part(header, family, last)) is not None]
    return weight_bytes(parts, config, last.shape(model))


def _part(header: TensorHeader, family: str, shard: Shard) -> TensorHeader | None:
    """Return what a rank has of a stored tensor, None if that is no weight."""
    origin = find_origin(header.name, family)
    if origin is None:
        return None
    shape = header.shape
    axis = cut_axis(origin.names[0], len(shape))
    if axis is None or axis >= len(shape):
        return header
    if origin.transposed and len(shape) == 2:
        axis = 1 - axis
    first, stop = shard.bounds(shape[axis])
    part, whole = stop - first, shape[axis]
    return replace(
        header,
        shape=(*shape[:axis], part, *shape[axis + 1 :]),
        count=header.count // whole * part,
        num_bytes=header.num_bytes // whole * part,
    )


def _torch_serves(config: EngineConfig) -> str | None:
    """Say why the kernels can't serve, as far as the configuration alone tells it."""
    if config.tensor_parallel_size > 1:
        return f"tensor_parallel_size = {config.tensor_parallel_size}"
    if config.device == "cpu" and config.dtype == "bfloat16" and not config.adapters:
        return None
    adapters = ", adapters = true" if config.adapters else ""
    return f"device = {config.device}, dtype = {config.dtype}{adapters}"


def _torch_has_cuda() -> bool:
    """Whether the installed torch is built for CUDA, without importing it."""
    found = importlib.util.find_spec("torch")
    if found is None or not found.submodule_search_locations:
        return False
    version = Path(found.submodule_search_locations[0]) / "version.py"
    return runpy.run_path(str(version)).get("cuda") is not None
