"""The decoder: one model for GPT-2, Llama, Mistral, Mixtral, Qwen2, Qwen3 and Qwen3-MoE.

Attention is passed in, so that training (packed documents) and serving (paged KV cache) run
the same code; see `model.attention`.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.model.attention import Attention
from minigpt.model.config import ModelConfig
from minigpt.model.layers import DecoderLayer, RotaryEmbedding, make_norm
from minigpt.model.linear import Int8Embedding, Int8Linear
from minigpt.model.moe import Router


class Runner(Protocol):
    """How the decoder calls its parts: training compiles the call, once for all layers."""

    def __call__(self, part: nn.Module, *inputs: Any) -> Tensor:
        """Return `part(*inputs)`."""
        ...


def call(part: nn.Module, *inputs: Any) -> Tensor:
    """Call a part as it is."""
    return part(*inputs)  # type: ignore[no-any-return]


def _embedding(num_embeddings: int, width: int) -> nn.Embedding:
    """Make an embedding that `init_weights` or a file fills.

    torch's own first values would be drawn for nothing; on the meta device, where a model that is
    loaded begins, drawing them imports torch's compiler: 0.7 s of a server's start.
    """
    values = torch.empty(num_embeddings, width)
    return nn.Embedding(num_embeddings, width, _weight=values)


class Trunk(nn.Module):
    """Everything from tokens to the final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = _embedding(config.vocab_size, config.hidden_size)
        self.embed_positions: nn.Embedding | None = None
        self.rotary: RotaryEmbedding | None = None
        if config.position == "learned":
            self.embed_positions = _embedding(config.context_length, config.hidden_size)
        else:
            self.rotary = RotaryEmbedding(config)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_layers))
        self.norm = make_norm(config)

    def forward(
        self, tokens: Tensor, positions: Tensor, attention: Attention, run: Runner
    ) -> Tensor:
        """Map (B, T) tokens to (B, T, C)."""
        hidden: Tensor = self.embed_tokens(tokens)
        if self.embed_positions is not None:
            hidden = hidden + self.embed_positions(positions)
        rotation = self.rotary(positions) if self.rotary is not None else None
        for layer in self.layers:
            hidden = run(layer, hidden, rotation, attention)
        return run(self.norm, hidden)


class Decoder(nn.Module):
    """A decoder-only transformer with pre-norm residual layers.

    Its state dict has the tensor names of Hugging Face's Llama: `model.layers.0.self_attn.
    q_proj.weight` and so on, `lm_head.weight` where the embeddings are not tied.

    Args:
        config: Shape and choices. Parameters start undefined in value: call `init_weights` or
            load them. Build under `torch.device("meta")` to allocate nothing.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head: nn.Linear | Int8Linear | None = None
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        attention: Attention,
        run: Runner = call,
    ) -> Tensor:
        """Compute the hidden states after the final norm.

        Args:
            tokens: (B, T) token ids; the engine passes its batch flattened to (1, N).
            positions: (B, T) position of each token in its own document.
            attention: Who sees whom; called once a layer.
            run: How layers and the final norm are called.

        Returns:
            (B, T, C).
        """
        return self.model(tokens, positions, attention, run)  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """Map (..., C) hidden states to (..., V) logits."""
        if self.lm_head is not None:
            return self.lm_head(hidden)  # type: ignore[no-any-return]
        embedding: nn.Embedding | Int8Embedding = self.model.embed_tokens
        if isinstance(embedding, Int8Embedding):
            return embedding.project(hidden)
        return F.linear(hidden, embedding.weight)

    @property
    def output_weight(self) -> Tensor:
        """The (V, C) output projection; of an int8 model a dequantised copy, made anew."""
        owner: nn.Module = self.lm_head if self.lm_head is not None else self.model.embed_tokens
        if isinstance(owner, Int8Linear | Int8Embedding):
            return owner.dequantized()
        weight = owner.weight
        assert isinstance(weight, Tensor)
        return weight

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Draw fresh weights, the same for the same generator state.

        Embeddings and the output projection are normal with deviation 0.02, so that the first
        loss is close to ln V. Other matrices have deviation 1 / sqrt(fan in), which keeps the
        variance of a normalised input; those that write to the residual stream 1 / sqrt(2 L)
        of that, so that its variance does not grow with depth (GPT-2). Norms are ones, biases
        zeros, those of the routers too.

        Args:
            generator: On the device of the parameters.
        """
        to_stream = 1 / math.sqrt(2 * self.config.num_layers)
        for name, parameter in self.named_parameters():
            owner = name.split(".")[-2]
            if name.endswith(".bias"):
                parameter.zero_()
            elif owner.endswith("norm"):
                parameter.fill_(1.0)
            elif owner.startswith("embed") or owner == "lm_head":
                parameter.normal_(0.0, 0.02, generator=generator)
            else:
                deviation = 1 / math.sqrt(parameter.shape[1])
                if owner in ("o_proj", "down_proj"):
                    deviation *= to_stream
                parameter.normal_(0.0, deviation, generator=generator)
        for module in self.modules():
            if isinstance(module, Router) and module.bias is not None:
                module.bias.zero_()
