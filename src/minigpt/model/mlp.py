"""The two MLPs of a layer; an expert is one of them too."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.model.config import ModelConfig


class SwiGLU(nn.Module):
    """Gated SiLU (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, width: int, inner: int, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (..., C) to (..., C)."""
        gated = F.silu(self.gate_proj(hidden)) * self.up_proj(hidden)
        return self.down_proj(gated)  # type: ignore[no-any-return]


class GeluMLP(nn.Module):
    """GELU in its tanh form, as GPT-2 has it."""

    def __init__(self, width: int, inner: int, bias: bool) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, inner, bias)
        self.down_proj = nn.Linear(inner, width, bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (..., C) to (..., C)."""
        inner = F.gelu(self.up_proj(hidden), approximate="tanh")
        return self.down_proj(inner)  # type: ignore[no-any-return]


def make_mlp(config: ModelConfig, inner: int) -> nn.Module:
    """Return the configured MLP, `inner` wide inside."""
    kind = SwiGLU if config.mlp == "swiglu" else GeluMLP
    return kind(config.hidden_size, inner, config.mlp_bias)
