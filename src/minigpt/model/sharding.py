"""How a decoder is cut among ranks that compute it together (tensor parallelism); no torch here.

Projections are cut by heads and by inner width (https://arxiv.org/abs/1909.08053): those that read
the residual stream by their outputs, those that write to it by their inputs, so that attention and
MLP of a layer each yield a sum over the ranks. Embedding and output projection are cut along the
vocabulary. Norms, routers and learned positions are whole on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from minigpt.core.errors import ConfigError
from minigpt.model.config import ModelConfig

_BY_OUTPUTS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
_BY_INPUTS = ("o_proj", "down_proj")


def cut_axis(name: str, dimensions: int) -> int | None:
    """Return the axis along which a tensor is cut, None where every rank has it whole.

    Args:
        name: The decoder's, or an adapter's: `...q_proj.weight`, `...q_proj.lora_A.weight`.
        dimensions: Of the tensor: what goes with outputs alone (biases, scales) has one.
    """
    owner, module, _ = _last_parts(name)
    if module == "lora_A":
        return 1 if owner in _BY_INPUTS else None
    if module == "lora_B":
        module = owner if owner in _BY_OUTPUTS else ""
    if module in _BY_INPUTS:
        return 1 if dimensions == 2 else None
    return 0 if module in _BY_OUTPUTS else None


def is_added_once(name: str) -> bool:
    """Whether a tensor is added to a sum over the ranks, so that one rank alone may have it."""
    _, module, kind = _last_parts(name)
    return kind == "bias" and module in _BY_INPUTS


def _last_parts(name: str) -> tuple[str, str, str]:
    owner, module, kind = ("", "", *name.split("."))[-3:]
    return owner, module, kind


def check_ranks(config: ModelConfig, ranks: int) -> None:
    """Refuse a number of ranks among which a model can't be cut.

    Raises:
        ConfigError: Heads, KV heads or an MLP's width don't divide; the message names them all.
    """
    widths = {"num_heads": config.num_heads, "num_kv_heads": config.num_kv_heads}
    if config.num_experts and config.expert_intermediate_size is not None:
        widths["expert_intermediate_size"] = config.expert_intermediate_size
    else:
        widths["intermediate_size"] = config.intermediate_size
    uneven = [f"{name} = {width}" for name, width in widths.items() if width % ranks]
    if config.vocab_size < ranks:
        uneven.append(f"vocab_size = {config.vocab_size}")
    if uneven:
        fitting = [
            size
            for size in range(1, min(config.num_kv_heads, config.vocab_size) + 1)
            if not any(width % size for width in widths.values())
        ]
        raise ConfigError(
            f"tensor_parallel_size = {ranks}: the model can't be cut so, its {', '.join(uneven)}",
            remedy=f"one of {', '.join(map(str, fitting))}",
        )


@dataclass(frozen=True)
class Shard:
    """One rank's part of a decoder that `check_ranks` accepts."""

    rank: int
    ranks: int

    def bounds(self, length: int) -> tuple[int, int]:
        """Return this rank's part of a length, (first, stop); parts differ by one at most."""
        return length * self.rank // self.ranks, length * (self.rank + 1) // self.ranks

    def shape(self, config: ModelConfig) -> ModelConfig:
        """Return the decoder that this rank holds; its vocabulary is this rank's part."""
        first, stop = self.bounds(config.vocab_size)
        inner = config.expert_intermediate_size
        return config.replace(
            vocab_size=stop - first,
            num_heads=config.num_heads // self.ranks,
            num_kv_heads=config.num_kv_heads // self.ranks,
            # Where experts have a width of their own this one is nobody's.
            intermediate_size=max(1, config.intermediate_size // self.ranks),
            expert_intermediate_size=None if inner is None else inner // self.ranks,
        )
