"""The parts of a decoder: norms, rotary positions, attention projections, the layer.

Parameter names are those of Hugging Face's Llama, so that most families need no renaming.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.model.attention import Attention
from minigpt.model.config import ModelConfig, RopeScaling
from minigpt.model.mlp import make_mlp
from minigpt.model.moe import MixtureOfExperts


class Rotation(NamedTuple):
    """Cosines and sines of a batch's positions, each (B, T, 1, D / 2) in fp32."""

    cos: Tensor
    sin: Tensor


class RotaryEmbedding(nn.Module):
    """Angles by which queries and keys are turned (https://arxiv.org/abs/2104.09864).

    The frequencies stay fp32 whatever the module is cast to: in bf16 positions beyond a few
    hundred would fall together.
    """

    inverse_frequencies: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.theta = config.rope_theta
        self.scaling = config.rope_scaling
        self.register_buffer("inverse_frequencies", self._frequencies(None), persistent=False)

    def forward(self, positions: Tensor) -> Rotation:
        """Return the rotation of each position; positions is (B, T)."""
        angles = positions[..., None, None].float() * self.inverse_frequencies
        return Rotation(angles.cos(), angles.sin())

    def reset(self, device: torch.device | str) -> None:
        """Compute the frequencies anew on a device, as after building on `meta`."""
        self.inverse_frequencies = self._frequencies(device)

    def _frequencies(self, device: torch.device | str | None) -> Tensor:
        where = torch.get_default_device() if device is None else torch.device(device)
        if where.type == "meta":  # where arithmetic imports torch's compiler: a second of a start
            return torch.empty(self.head_dim // 2, device=where)
        exponents = torch.arange(0, self.head_dim, 2, device=device).float() / self.head_dim
        frequencies = 1.0 / self.theta**exponents
        return frequencies if self.scaling is None else _scale(frequencies, self.scaling)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        module: Self = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.reset(self.inverse_frequencies.device)
        return module


def _scale(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Stretch frequencies to a longer context.

    llama3 leaves short wavelengths alone, divides long ones by the factor and ramps between
    (https://github.com/meta-llama/llama-models, `apply_scaling`).
    """
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_context_length / wavelengths
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def rotate(heads: Tensor, rotation: Rotation) -> Tensor:
    """Turn each pair (i, i + D / 2) of (B, T, H, D) by its position's angle, in fp32."""
    first, second = heads.chunk(2, dim=-1)
    cos, sin = rotation  # fp32, so that the products are fp32 too
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(heads.dtype)


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm, statistics in fp32 (https://arxiv.org/abs/1910.07467).

    Under autocast the input may be bf16 while the weight is fp32; casting the weight keeps the
    fused kernel and the input's dtype.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (..., C) to (..., C)."""
        weight = self.weight.to(inputs.dtype)
        return F.rms_norm(inputs, self.normalized_shape, weight, self.eps)


def make_norm(config: ModelConfig) -> nn.Module:
    """Return the configured norm over the residual stream; statistics are fp32 in any dtype."""
    kind: Any = RMSNorm if config.norm == "rmsnorm" else nn.LayerNorm
    norm: nn.Module = kind(config.hidden_size, eps=config.norm_eps)
    return norm


class SelfAttention(nn.Module):
    """Projections around an `Attention`."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        width = config.hidden_size
        queries = config.num_heads * config.head_dim
        keys = config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(width, queries, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, keys, bias=config.qkv_bias)
        self.o_proj = nn.Linear(queries, width, bias=config.output_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, hidden: Tensor, rotation: Rotation | None, attention: Attention) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        query = self.q_proj(hidden).unflatten(-1, (-1, self.head_dim))
        key = self.k_proj(hidden).unflatten(-1, (-1, self.head_dim))
        value = self.v_proj(hidden).unflatten(-1, (-1, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        mixed = attention(self.layer, query, key, value)
        return self.o_proj(mixed.flatten(-2))  # type: ignore[no-any-return]


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = make_norm(config)
        self.self_attn = SelfAttention(config, layer)
        self.post_attention_layernorm = make_norm(config)
        self.mlp: nn.Module
        if config.num_experts:
            self.mlp = MixtureOfExperts(config)
        else:
            self.mlp = make_mlp(config, config.intermediate_size)

    def forward(self, hidden: Tensor, rotation: Rotation | None, attention: Attention) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rotation, attention)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))  # type: ignore[no-any-return]
