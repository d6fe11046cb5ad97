"""Settle the engine's "auto" values and check that the model and its cache fit; no torch here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from minigpt.core.errors import ConfigError, ModelError
from minigpt.core.machine import Machine
from minigpt.engine.config import EngineConfig
from minigpt.kernels.cache_format import CacheFormat, token_bytes
from minigpt.model.config import ModelConfig

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}

Report = Callable[[str], None]
"""Receives one line for each derived number: what, how much, and why."""


def resolve_numerics(
    config: EngineConfig, machine: Machine, *, cuda: bool, report: Report
) -> EngineConfig:
    """Settle device, dtypes, activation bits, threads and token budget, whatever the weights.

    Raises:
        ConfigError: A GPU is asked for and there is none.
    """
    changes: dict[str, object] = {}
    if config.device == "auto":
        changes["device"] = "cuda" if cuda else "cpu"
        report(f"device = {changes['device']}: {'a GPU is there' if cuda else 'no GPU is there'}")
    on_gpu = changes.get("device", config.device) == "cuda"
    if on_gpu and not cuda:
        raise ConfigError("device = cuda: this machine has none", remedy="set device=cpu")
    if config.dtype == "auto":
        fast = on_gpu or machine.fast_bfloat16
        changes["dtype"] = "bfloat16" if fast else "float32"
        report(f"dtype = {changes['dtype']}: {'fast' if fast else 'no bfloat16'} in hardware")
    if config.kv_cache_dtype == "auto":
        changes["kv_cache_dtype"] = changes.get("dtype", config.dtype)
    if config.activation_bits == "auto":
        changes["activation_bits"] = activation_bits(config)
    if config.threads == "auto":
        ranks = config.tensor_parallel_size
        changes["threads"] = max(1, machine.cores // ranks)
        shared = "" if ranks == 1 else f", shared among {ranks} processes"
        report(f"threads = {changes['threads']}: cores that this process may use{shared}")
    if config.max_batched_tokens == "auto":
        budget = max(2048 if on_gpu else 256, config.max_num_seqs)
        changes["max_batched_tokens"] = budget
        report(f"max_batched_tokens = {budget}: a prompt delays streams by one such step")
    return config.replace(**changes)


def kv_cache_dtype(config: EngineConfig) -> CacheFormat:
    """Return what keys and values are kept in, of a config whose dtype is settled."""
    assert config.dtype != "auto"
    return config.dtype if config.kv_cache_dtype == "auto" else config.kv_cache_dtype


def check_kv_cache_dtype(
    cache_format: CacheFormat, dtype: str, *, torch_serves: str | None
) -> None:
    """Refuse a KV cache that torch would serve and can't.

    Args:
        cache_format: Of the cache.
        dtype: Of activations.
        torch_serves: Why torch serves and not the kernels, if it does.

    Raises:
        ConfigError: The cache isn't in the activations' dtype, and torch serves.
    """
    if torch_serves is not None and cache_format != dtype:
        raise ConfigError(
            f"kv_cache_dtype = {cache_format} beside dtype = {dtype} is the kernels', and torch "
            f"serves here: {torch_serves}",
            remedy=f"set kv_cache_dtype to auto, which is {dtype}",
        )


def activation_bits(config: EngineConfig) -> Literal[8, 16]:
    """Return to what the inputs of integer weights are rounded."""
    return 16 if config.activation_bits == "auto" else config.activation_bits


def check_activation_bits(bits: int, *, quantized: bool, torch_serves: str | None) -> None:
    """Refuse 8-bit activations where nothing would round to them.

    Args:
        bits: 8 or 16.
        quantized: Whether the model has integer weights.
        torch_serves: Why torch serves it and not the kernels, if it does.

    Raises:
        ModelError: 8, and no kernel multiplies integer weights.
    """
    if bits == 16:
        return
    asked = f"activation_bits = {bits} is of the kernels' products with integer weights"
    if not quantized:
        raise ModelError(
            f"{asked}, and the model has none",
            remedy="quantize it with `minigpt compress`, or leave activation_bits at auto",
        )
    if torch_serves is not None:
        raise ModelError(
            f"{asked}, and torch serves here: {torch_serves}",
            remedy="leave activation_bits at auto",
        )


def resolve_memory(
    config: EngineConfig,
    model: ModelConfig,
    *,
    available: int,
    report: Report,
    draft: ModelConfig | None = None,
) -> EngineConfig:
    """Settle the context length and the KV cache's size.

    Args:
        config: With device and dtype settled.
        model: The architecture to be served.
        available: Free bytes on the device once the weights are loaded.
        report: Where the derivation goes.
        draft: The drafting model's architecture: its cache has the same blocks.

    Raises:
        ConfigError: The context is longer than the model's, or the cache can't hold one full
            context; the message states the shortfall in bytes.
    """
    context_length = (
        model.context_length if config.context_length == "auto" else config.context_length
    )
    if draft is not None and draft.vocab_size != model.vocab_size:
        raise ConfigError(
            f"draft_model: its vocabulary has {draft.vocab_size} tokens, the model's "
            f"{model.vocab_size}",
            remedy="draft with a model of the same tokenizer",
        )
    if draft is not None and draft.context_length < context_length:
        raise ConfigError(
            f"draft_model: its context is {draft.context_length} tokens, the engine's "
            f"{context_length}",
            remedy=f"set context_length={draft.context_length} or draft with another model",
        )
    if context_length > model.context_length:
        raise ConfigError(
            f"context_length = {context_length}: the model's is {model.context_length}",
            remedy="lower context_length",
        )
    per_token = kv_bytes_per_token(config, model, draft)
    per_block = per_token * config.block_size
    one_context = -(-context_length // config.block_size) * per_block
    if config.kv_cache_bytes == "auto":
        wanted = one_context * config.max_num_seqs
        allowed = int(available * config.memory_fraction)
        size = min(wanted, allowed) // per_block * per_block
        report(
            f"kv_cache_bytes = {size}: {per_token} B/token in {kv_cache_dtype(config)} x "
            f"{size // per_token} tokens; "
            f"{config.max_num_seqs} full contexts of {context_length} need {wanted}, "
            f"{config.memory_fraction:g} of {available} free allow {allowed}"
        )
    else:
        size = config.kv_cache_bytes // per_block * per_block
        if size > available:
            raise ConfigError(
                f"kv_cache_bytes = {config.kv_cache_bytes}: only {available} bytes are free "
                f"after the weights, short by {size - available}",
                remedy="lower kv_cache_bytes or set it to auto",
            )
    if size < one_context:
        raise ConfigError(
            f"the KV cache would have {size} bytes, one context of {context_length} tokens needs "
            f"{one_context}: short by {one_context - size}",
            remedy="lower context_length, raise kv_cache_bytes or free memory",
        )
    return config.replace(context_length=context_length, kv_cache_bytes=size)


def kv_bytes_per_token(
    config: EngineConfig, model: ModelConfig, draft: ModelConfig | None = None
) -> int:
    """Return the bytes that one token's keys and values take over all layers, of both models.

    Of several ranks it is the first one's, which has its part of the model and all that drafts.
    """
    cache_format = kv_cache_dtype(config)
    heads = model.num_kv_heads // config.tensor_parallel_size
    total = model.num_layers * token_bytes(cache_format, heads, model.head_dim)
    if draft is not None:
        total += draft.num_layers * token_bytes(cache_format, draft.num_kv_heads, draft.head_dim)
    return total
