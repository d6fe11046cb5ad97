"""What an operator may choose about the engine; "auto" values are settled in `resolve`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from minigpt.core.config import Auto, Config


class SpeculativeConfig(Config):
    """Drafting tokens that are verified several at a step; answers stay the same."""

    method: Literal["none", "ngram", "draft", "heads"] = "ngram"
    """ngram looks up what followed the last tokens before; draft asks a smaller model, heads asks
    small ones trained on top of the model. All end by themselves where they lose."""
    max_draft_tokens: PositiveInt = 8
    """Most tokens drafted for a sequence in a step."""
    min_ngram: PositiveInt = 2
    """Fewest last tokens that must have occurred before."""
    max_ngram: PositiveInt = 8
    """Most last tokens that are compared; where more agree is preferred."""
    draft_model: str | None = None
    """A local model with the same vocabulary, several times smaller."""
    draft_heads: str | None = None
    """Heads of the served model, local: from a run with objective.kind = draft-heads."""
    draft_vocabulary: PositiveInt | None = None
    """heads: draft only this many first tokens of the vocabulary, in a BPE nearly the most
    frequent ones, so that less is multiplied; null is all."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_ngram < self.min_ngram:
            raise ValueError(
                f"max_ngram = {self.max_ngram} must be at least min_ngram = {self.min_ngram}"
            )
        for method, key in (("draft", "draft_model"), ("heads", "draft_heads")):
            value = getattr(self, key)
            if (self.method == method) != (value is not None):
                raise ValueError(
                    f"method = {self.method} with {key} = {value}: {key} is given with "
                    f"method = {method}, and only there"
                )
        if self.method != "heads" and self.draft_vocabulary is not None:
            raise ValueError(
                f"draft_vocabulary = {self.draft_vocabulary} with method = {self.method}: it is "
                "given with method = heads, and only there"
            )
        return self


class EngineConfig(Config):
    """Memory, batching and numerics of the engine."""

    device: Auto | Literal["cpu", "cuda"] = "auto"
    """Where the model runs; auto is cuda where there is one."""
    dtype: Auto | Literal["float32", "bfloat16"] = "auto"
    """Weights and activations; auto is bfloat16 where the hardware multiplies it."""
    activation_bits: Auto | Literal[8, 16] = "auto"
    """To what the kernels round the inputs of integer weights, each group by its largest: 8 is
    faster from a few rows on and errs about as 8 bits of weight do (W8A8). auto is 16, which errs
    less than bfloat16 does. 8 is refused where the weights aren't integers, or torch serves."""
    kv_cache_dtype: Auto | Literal["float32", "bfloat16", "int8"] = "auto"
    """What cached keys and values are kept in; auto is `dtype`. int8 has a scale for each token
    and head, and takes little more than half of bfloat16's memory. Any other than `dtype` is the
    kernels': it is refused where torch serves."""
    threads: Auto | PositiveInt = "auto"
    """Threads of a matrix product on a CPU; auto is the cores that this process may use, shared
    among tensor_parallel_size."""
    tensor_parallel_size: PositiveInt = 1
    """Processes of this machine that compute the model together, each with a part of every layer
    and of the KV cache: for models larger than one GPU. It must divide the heads, the KV heads
    and the MLP's width."""
    tensor_parallel_timeout_seconds: PositiveFloat = 60.0
    """How long these processes wait for each other in a step before the engine fails."""
    context_length: Auto | PositiveInt = "auto"
    """Most tokens of prompt and answer together; auto is the model's own limit."""
    block_size: PositiveInt = 16
    """Tokens in a block of the KV cache."""
    kv_cache_bytes: Auto | PositiveInt = "auto"
    """Memory for the KV cache; auto is what max_num_seqs full contexts need, within
    memory_fraction of what is free after the weights. Of each process, where several compute."""
    memory_fraction: float = Field(default=0.8, gt=0, le=1)
    """Share of the free memory that an "auto" KV cache may take."""
    max_num_seqs: PositiveInt = 32
    """Most sequences in a step; the others wait."""
    max_batched_tokens: Auto | PositiveInt = "auto"
    """Token budget of a step, shared by decode (served first) and prefill; it bounds how long
    a prompt can delay the running streams. auto is 256 on a CPU and 2048 on a GPU."""
    inter_token_target_ms: Auto | PositiveFloat = "auto"
    """Most milliseconds of a step while streams run: each step takes in as much of the waiting
    prompts as is predicted to fit, at least 16 tokens. auto follows the measured steps: twice
    what the streams alone take, at least 30."""
    prefix_cache: bool = True
    """Keep the blocks of finished sequences for those that begin with the same tokens."""
    speculative: SpeculativeConfig = SpeculativeConfig()
    """How tokens are drafted."""
    tenant_weights: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Shares of the engine by tenant; one that is not named has 1."""
    input_token_weight: float = Field(default=1.0, ge=0)
    """What a computed prompt token counts in a tenant's share."""
    output_token_weight: float = Field(default=2.0, gt=0)
    """What a generated token counts in a tenant's share."""
    priority_step_tokens: PositiveInt = 100_000
    """A priority goes before the next one unless that has waited while the engine computed this
    many tokens more: so no priority starves another."""
    adapters: bool = False
    """Take LoRA adapters while serving, which is torch's: the kernels are then left alone. Where
    torch serves anyway, adapters are taken whatever this says."""
    batch_invariant: bool = False
    """Serve only if an answer depends, to the last bit, on weights, tokenizer and request alone:
    not on what shares its batch, how its prompt was chunked, cached or preempted, or on drafts.
    The kernels compute so at no cost; where torch would serve, the engine refuses to start."""
    max_logprobs: int = Field(default=20, ge=0)
    """Most alternatives that a request may ask for with each token."""
    seed: int | None = None
    """Where the seeds of requests without one come from; null draws fresh ones."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_batched_tokens != "auto" and self.max_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_batched_tokens = {self.max_batched_tokens} must be at least "
                f"max_num_seqs = {self.max_num_seqs}, or decode could not serve all"
            )
        if self.speculative.method == "heads" and self.tensor_parallel_size > 1:
            raise ValueError(
                f"speculative.method = heads with tensor_parallel_size = "
                f"{self.tensor_parallel_size}: draft heads are one process's; draft with ngram"
            )
        return self


class ParityConfig(Config):
    """How serving is compared with training; see `minigpt parity`."""

    dtypes: tuple[Auto | Literal["float32", "bfloat16"], ...] = Field(("auto",), min_length=1)
    """Serve in each of these, one after another; auto is what `minigpt serve` takes here."""
    kv_cache_dtypes: tuple[Auto | Literal["float32", "bfloat16", "int8"], ...] = Field(
        ("auto",), min_length=1
    )
    """With each of these KV caches, for each dtype; auto is the dtype."""
    max_tokens: int = Field(4096, ge=2)
    """Compare this many of the text's first tokens."""
    context_length: int = Field(512, ge=2)
    """Cut them into windows of this length, or the model's own limit where that is less."""
    decode_tokens: int = Field(16, ge=1)
    """Continue each window's beginning by this many greedy tokens."""
    engine: EngineConfig = EngineConfig()
    """The engine that serves; its dtypes are taken from those above."""
