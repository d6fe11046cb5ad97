"""The architecture of a decoder, with the counts that follow from it.

No torch here, so that planning and help texts can read it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from minigpt.core.config import Config


class RopeScaling(Config):
    """How rotary frequencies stretch beyond the trained context (Hugging Face's names)."""

    kind: Literal["linear", "llama3"]
    """linear divides every frequency by `factor`; llama3 only the low ones, with a ramp."""
    factor: float = Field(gt=0)
    """How many times longer the context becomes."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original / this are fully scaled."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original / this are left alone."""
    original_context_length: int = 8192
    """llama3: context length before scaling."""


Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class LoraConfig(Config):
    """Low-rank adapters beside frozen weights (https://arxiv.org/abs/2106.09685)."""

    rank: int = Field(default=0, ge=0)
    """Inner width of an adapter; 0 has none and trains all weights."""
    alpha: float = Field(default=16.0, gt=0)
    """The adapters' product is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of an adapter's inputs that is dropped in training."""
    targets: tuple[Projection, ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    """Which of each layer's projections get an adapter."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(
                f"lora.targets = {self.targets}: name each projection once, at least one"
            )
        return self


@dataclass(frozen=True)
class ParameterCounts:
    """How many parameters a decoder has."""

    total: int
    """All of them; a tied output projection counts once."""
    embedding: int
    """Token and learned position embeddings: looked up, not multiplied."""
    matmul: int
    """Weights that every token is multiplied with, the output projection (tied or not)
    included, biases and norms not: the N of 6 N. Of the experts those that a token takes."""


class ModelConfig(Config):
    """Shape and choices of a decoder. The defaults are Qwen3's, as minigpt trains them."""

    vocab_size: int
    """Tokens in the vocabulary, rows of the embedding."""
    num_layers: int
    """Transformer blocks."""
    hidden_size: int
    """Width of the residual stream."""
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key and value heads; must divide num_heads."""
    head_dim: int
    """Width of a head."""
    intermediate_size: int
    """Width inside the MLP."""
    context_length: int
    """Most tokens in a sequence."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Normalisation before attention, before the MLP and at the end."""
    norm_eps: float = Field(1e-6, ge=0)
    """Added to the variance."""
    position: Literal["rope", "learned"] = "rope"
    """Rotary embeddings in attention, or a learned table added to the input."""
    rope_theta: float = Field(10_000.0, gt=0)
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """How rotary frequencies are stretched, if at all."""
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    """Gated SiLU, or GELU (tanh form, as GPT-2)."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections."""
    output_bias: bool = False
    """Bias on the attention's output projection."""
    mlp_bias: bool = False
    """Biases on the MLP's projections."""
    qk_norm: bool = True
    """RMSNorm on each query and key head before the rotation."""
    tie_embeddings: bool = True
    """Share the token embedding with the output projection."""
    sliding_window: int | None = None
    """A token sees this many latest tokens, itself included; None is all."""
    num_experts: int = Field(0, ge=0)
    """MLPs in each layer, of which a token takes a few; 0 is one MLP for all."""
    experts_per_token: int = Field(2, ge=1)
    """Experts that each token goes through."""
    expert_intermediate_size: int | None = Field(None, ge=1)
    """Width inside an expert; None is intermediate_size."""
    norm_topk_prob: bool = True
    """Scale the weights of a token's experts to a sum of 1."""
    router_bias: bool = True
    """Steer the choice of experts by a bias that evens out their load."""
    eos_token_id: int | None = None
    """The token that ends a text."""
    stop_token_ids: tuple[int, ...] = ()
    """Further tokens that end a text (Llama 3 has several)."""
    bos_token_id: int | None = None
    """The token that starts a text, if the tokenizer adds one."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        sizes: dict[str, Any] = {
            name: getattr(self, name)
            for name in (
                "vocab_size",
                "num_layers",
                "hidden_size",
                "num_heads",
                "num_kv_heads",
                "head_dim",
                "intermediate_size",
                "context_length",
            )
        }
        if self.sliding_window is not None:
            sizes["sliding_window"] = self.sliding_window
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} = {value}: must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads = {self.num_kv_heads} must divide num_heads = {self.num_heads}"
            )
        if self.position == "rope" and self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim}: rotary positions need an even width")
        if self.num_experts and self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token = {self.experts_per_token} exceeds "
                f"num_experts = {self.num_experts}"
            )
        return self

    def parameter_counts(self) -> ParameterCounts:
        """Count parameters from the shape alone."""
        width, queries = self.hidden_size, self.num_heads * self.head_dim
        keys = self.num_kv_heads * self.head_dim
        inner, mlps, router = self.intermediate_size, 1, 0
        if self.num_experts:
            inner = self.expert_intermediate_size or self.intermediate_size
            mlps, router = self.num_experts, self.num_experts * width
        gated = self.mlp == "swiglu"
        mlp = width * inner * (3 if gated else 2)
        used = min(self.experts_per_token, mlps)
        per_layer = width * (2 * queries + 2 * keys) + router + mlp * used
        matmul = self.num_layers * per_layer + self.vocab_size * width
        per_layer += mlp * (mlps - used)

        norm = width * (2 if self.norm == "layernorm" else 1)
        small = 2 * norm
        small += (queries + 2 * keys) * self.qkv_bias + width * self.output_bias
        small += (inner * (2 if gated else 1) + width) * self.mlp_bias * mlps
        small += 2 * self.head_dim * self.qk_norm

        embedding = self.vocab_size * width
        if self.position == "learned":
            embedding += self.context_length * width
        total = self.num_layers * (per_layer + small) + norm + embedding
        if not self.tie_embeddings:
            total += self.vocab_size * width
        return ParameterCounts(total=total, embedding=embedding, matmul=matmul)

    def flops_per_token(self, sequence_length: int, *, training: bool = True) -> int:
        """Return the floating-point operations of one token in a sequence of that length.

        Convention: 6 N + 12 L d s for training (forward and backward), a third of it for the
        forward pass alone. N is the matmul weights (`ParameterCounts.matmul`), L the layers,
        d the width of all query heads together, s the sequence length. Attention counts in
        full, as if it were not causal, as torchtitan and nanochat count it; a sliding window
        is not credited either.
        """
        attention = self.num_layers * self.num_heads * self.head_dim * sequence_length
        forward = 2 * self.parameter_counts().matmul + 4 * attention
        return 3 * forward if training else forward
