"""Run the model's steps through the kernel library, where it covers the model."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from minigpt.core.errors import ModelError
from minigpt.engine.adapters import AdapterSet
from minigpt.engine.batch import Chunk
from minigpt.engine.packing import pack_weights
from minigpt.engine.prompt_scores import read_prompt
from minigpt.engine.resolve import check_activation_bits, check_kv_cache_dtype
from minigpt.engine.runner import ModelRunner, Watch
from minigpt.engine.sequence import Sequence
from minigpt.kernels import library
from minigpt.kernels.cache_format import CacheFormat
from minigpt.kernels.kv_layout import KVLayout
from minigpt.kernels.linear import PackedWeight, pack_bfloat16, pack_int4, pack_int8
from minigpt.kernels.step import Layer, Norm, Plan, Step
from minigpt.model.decoder import Decoder
from minigpt.model.layers import DecoderLayer, SelfAttention
from minigpt.model.linear import Int4Linear, Int8Embedding, Int8Linear, unpack_nibbles
from minigpt.model.mlp import GeluMLP, SwiGLU
from minigpt.model.weights import LoadedModel


class Runner(Protocol):
    """Runs the model on a step's batch."""

    name: ClassVar[str]
    """`kernels` or `torch`."""

    @property
    def activation_bits(self) -> int | None:
        """To what the inputs of integer weights are rounded; None where nothing is."""
        ...

    @property
    def adapters(self) -> AdapterSet | None:
        """The model's adapters; None where it can have none."""
        ...

    def with_model(self, loaded: LoadedModel) -> Runner:
        """Return a runner of other weights over the same cache.

        Raises:
            ModelError: It can't run them.
        """
        ...

    def close(self) -> None:
        """Free what other processes hold of its weights; it runs no more."""
        ...

    def run(self, chunks: list[Chunk]) -> tuple[Tensor, list[Sequence]]:
        """See `ModelRunner.run`."""
        ...

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """See `ModelRunner.copy_blocks`."""
        ...

    def clear(self, blocks: list[int]) -> None:
        """See `ModelRunner.clear`."""
        ...


class StatefulRunner(Runner, Protocol):
    """A runner whose hidden states others can use."""

    watch: Watch | None
    """Who sees the states that were sampled from; not passed on by `with_model`."""

    def embed(self, tokens: list[int]) -> Tensor:
        """See `ModelRunner.embed`."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """See `ModelRunner.logits`."""
        ...


def make_runner(
    model: Decoder,
    *,
    num_blocks: int,
    block_size: int,
    dtype: torch.dtype,
    adapters: bool,
    cache_format: CacheFormat | None = None,
    activation_bits: Literal[8, 16] = 16,
    guesses: bool = False,
) -> StatefulRunner:
    """Return the kernels' runner where they cover the model, else torch's.

    Args:
        model: In eval mode, on its device. Either runner takes its weights: it is not to be used
            beside it.
        num_blocks: Blocks of the KV cache.
        block_size: Tokens in a block.
        dtype: Of activations, and of the KV cache if nothing else is asked.
        adapters: Whether it must serve adapters, which is torch's.
        cache_format: Of the KV cache; None is the dtype, any other is the kernels'.
        activation_bits: To what the inputs of integer weights are rounded; 8 is the kernels'.
        guesses: Whether it only drafts for another model.

    Raises:
        ModelError: 8-bit activations where nothing rounds to them.
        ConfigError: A cache of another format than the dtype where torch serves.
    """
    cache: dict[str, Any] = {"num_blocks": num_blocks, "block_size": block_size, "dtype": dtype}
    reason = not_covered(model, dtype, block_size, adapters=adapters)
    quantized = _has_integers(model)
    check_activation_bits(activation_bits, quantized=quantized, torch_serves=reason)
    own = _cache_format(dtype)
    whose = " (the draft model)" if guesses else ""
    check_kv_cache_dtype(
        cache_format or own, own, torch_serves=None if reason is None else reason + whose
    )
    if reason is None:
        return NativeRunner(
            model,
            **cache,
            cache_format=cache_format,
            activation_bits=activation_bits,
            guesses=guesses,
        )
    pack_weights(model)
    return ModelRunner.with_cache(model, **cache, guesses=guesses)


def not_covered(
    model: Decoder, dtype: torch.dtype, block_size: int, *, adapters: bool = False
) -> str | None:
    """Say why the kernels cannot run a model, or return None if they can."""
    if adapters:
        return "adapters are torch's"
    kernels = library.find()
    if isinstance(kernels, library.Absence):
        return kernels.reason
    config = model.config
    if dtype != torch.bfloat16:
        return f"{dtype} is torch's: the kernels' floating-point weights are bfloat16"
    if any(value.device.type != "cpu" for value in model.state_dict().values()):
        return "the model is not on the CPU"
    if config.num_experts:
        return "mixtures of experts are torch's"
    layout = KVLayout(_cache_format(dtype), block_size, config.num_kv_heads, config.head_dim)
    if not layout.fits(config.num_heads):
        return (
            f"heads of {config.head_dim}, {config.num_heads} over {config.num_kv_heads}, in "
            f"blocks of {block_size} tokens do not fit the kernels"
        )
    for name, module in model.named_modules():
        if type(module) is nn.Linear and module.weight.dtype != torch.bfloat16:
            return (
                f"{name} is {module.weight.dtype}: the kernels' floating-point weights are bfloat16"
            )
        children = isinstance(module, SelfAttention | SwiGLU | GeluMLP) and module.children()
        for child in children or ():
            if type(child) not in (nn.Linear, Int8Linear, Int4Linear) and not isinstance(
                child, nn.RMSNorm
            ):
                return f"{name} has a {type(child).__name__}"
    return None


class NativeRunner:
    """`ModelRunner` over the kernel library.

    Args:
        model: In eval mode, covered by the kernels. Its weights are packed and then given up,
            layer by layer: what is left of them is on the meta device.
        num_blocks: Blocks of the KV cache.
        block_size: Tokens in a block.
        dtype: Of activations, and of the cache if nothing else is asked.
        cache_format: Of the KV cache; None is the dtype.
        activation_bits: To what the inputs of integer weights are rounded.
        caches: Another runner's, to be used too; None makes them.
        guesses: Whether it only drafts: prompts are not read.
    """

    name: ClassVar[str] = "kernels"
    adapters = None

    def __init__(
        self,
        model: Decoder,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        cache_format: CacheFormat | None = None,
        activation_bits: Literal[8, 16] = 16,
        caches: list[Tensor] | None = None,
        guesses: bool = False,
    ) -> None:
        kernels = library.loaded()
        assert kernels is not None, "see not_covered"
        config = model.config
        layout = KVLayout(
            cache_format or _cache_format(dtype), block_size, config.num_kv_heads, config.head_dim
        )
        self._block_size = block_size
        self._dtype = dtype
        self._cache_format = cache_format
        self._activation_bits = activation_bits
        self.activation_bits = activation_bits if _has_integers(model) else None
        self._guesses = guesses
        self.watch: Watch | None = None
        if caches is None:
            caches = [layout.allocate(num_blocks) for _ in range(config.num_layers)]
        self._caches = caches
        self._plan = _plan(model, layout, self._caches, dtype, activation_bits)
        self._step = Step(self._plan, kernels)

    def with_model(self, loaded: LoadedModel) -> NativeRunner:
        """See `Runner.with_model`; takes the model's weights as the first one's."""
        model = loaded.model
        if (reason := not_covered(model, self._dtype, self._block_size)) is not None:
            raise ModelError(
                f"the kernels that serve can't run these weights: {reason}",
                remedy="serve them with a server of their own",
            )
        bits = self._activation_bits
        check_activation_bits(bits, quantized=_has_integers(model), torch_serves=None)
        return NativeRunner(
            model,
            num_blocks=len(self._caches[0]),
            block_size=self._block_size,
            dtype=self._dtype,
            cache_format=self._cache_format,
            activation_bits=bits,
            caches=self._caches,
            guesses=self._guesses,
        )

    def close(self) -> None:
        """Nothing is held elsewhere."""

    def run(self, chunks: list[Chunk]) -> tuple[Tensor, list[Sequence]]:
        """See `ModelRunner.run`."""
        tokens: list[int] = []
        tables: list[int] = []
        described: list[tuple[int, int, int, int]] = []
        last_rows: list[int] = []
        sampled: list[Sequence] = []
        read: list[Chunk] = []
        hidden_rows: list[int] = []
        for chunk in chunks:
            sequence = chunk.sequence
            if not self._guesses and sequence.reader is not None:
                read.append(chunk)
                hidden_rows += range(len(tokens), len(tokens) + chunk.length)
            described.append((len(tokens), chunk.length, chunk.start, len(tables)))
            tokens += chunk.token_ids
            tables += sequence.block_table[: -(-chunk.stop // self._block_size)]
            last_rows += range(len(tokens) - chunk.num_logits, len(tokens))
            sampled += [sequence] * chunk.num_logits
        if self.watch is not None:
            hidden_rows += last_rows
        logits, hidden = self._step.run(tokens, described, tables, last_rows, hidden_rows)
        for chunk in read:
            read_prompt(hidden[: chunk.length], chunk, self._step.project)
            hidden = hidden[chunk.length :]
        if self.watch is not None and sampled:
            self.watch(chunks, hidden)
        return logits, sampled

    def embed(self, tokens: list[int]) -> Tensor:
        """See `ModelRunner.embed`."""
        table, scales = self._plan.embedding[tokens], self._plan.embedding_scales
        return table if scales is None else (table * scales[tokens, None]).to(self._dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """See `ModelRunner.logits`."""
        return self._step.project(hidden)

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """See `ModelRunner.copy_blocks`."""
        for source, destination in copies:
            for cache in self._caches:
                cache[destination].copy_(cache[source])

    def clear(self, blocks: list[int]) -> None:
        """See `ModelRunner.clear`."""
        for cache in self._caches:
            cache[blocks] = 0


def _cache_format(dtype: torch.dtype) -> CacheFormat:
    return "bfloat16" if dtype == torch.bfloat16 else "float32"


def _has_integers(model: Decoder) -> bool:
    return any(isinstance(module, Int8Linear | Int4Linear) for module in model.modules())


@torch.inference_mode()
def _plan(
    model: Decoder,
    layout: KVLayout,
    caches: list[Tensor],
    dtype: torch.dtype,
    activation_bits: Literal[8, 16],
) -> Plan:
    config, trunk = model.config, model.model
    layers = []
    for layer, cache in zip(trunk.layers, caches, strict=True):
        assert isinstance(layer, DecoderLayer)
        layers.append(_layer(layer, cache, dtype))
        layer.to("meta")
    embedding: nn.Embedding | Int8Embedding = trunk.embed_tokens
    table, scales = embedding.weight.detach(), None
    if isinstance(embedding, Int8Embedding):
        scales = embedding.scale.float()
    if model.lm_head is not None:
        head = _pack(model.lm_head)
        model.lm_head.to("meta")
    elif isinstance(embedding, Int8Embedding):
        head = pack_int8(table, embedding.scale)
    else:
        head = pack_bfloat16(table.bfloat16())
    learned = trunk.embed_positions
    return Plan(
        dtype=dtype,
        layout=layout,
        heads=config.num_heads,
        layers=layers,
        embedding=table if scales is not None else table.to(dtype),
        embedding_scales=scales,
        position_table=None if learned is None else _to(learned.weight, dtype),
        frequencies=None if trunk.rotary is None else trunk.rotary.inverse_frequencies,
        final_norm=_norm(trunk.norm, dtype),
        head=head,
        window=config.sliding_window,
        layer_norm=config.norm == "layernorm",
        gated=config.mlp == "swiglu",
        eps=config.norm_eps,
        activation_bits=activation_bits,
    )


def _layer(layer: DecoderLayer, cache: Tensor, dtype: torch.dtype) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    assert isinstance(mlp, SwiGLU | GeluMLP)
    query_norm, key_norm = attention.q_norm, attention.k_norm
    return Layer(
        input_norm=_norm(layer.input_layernorm, dtype),
        inner_norm=_norm(layer.post_attention_layernorm, dtype),
        qkv=_pack(attention.q_proj, attention.k_proj, attention.v_proj),
        output=_pack(attention.o_proj),
        up=_pack(mlp.gate_proj, mlp.up_proj) if isinstance(mlp, SwiGLU) else _pack(mlp.up_proj),
        down=_pack(mlp.down_proj),
        cache=cache,
        query_norm=None if query_norm is None else _to(query_norm.weight, dtype),
        key_norm=None if key_norm is None else _to(key_norm.weight, dtype),
    )


def _norm(norm: nn.Module, dtype: torch.dtype) -> Norm:
    assert isinstance(norm, nn.RMSNorm | nn.LayerNorm)
    bias = norm.bias if isinstance(norm, nn.LayerNorm) else None
    return Norm(_to(norm.weight, dtype), None if bias is None else _to(bias, dtype))


def _to(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a weight that outlives its module."""
    return weight.detach().to(dtype).contiguous()


def _pack(*parts: nn.Linear | Int8Linear | Int4Linear) -> PackedWeight:
    """Pack linear layers of one kind and the same inputs as one, outputs one after the other."""
    weight = torch.cat([part.weight for part in parts])
    biases = [part.bias for part in parts if part.bias is not None]
    bias = torch.cat(biases) if biases else None
    scales = [part.scale for part in parts if isinstance(part, Int8Linear | Int4Linear)]
    zeros = [part.zero for part in parts if isinstance(part, Int4Linear)]
    if zeros:
        return pack_int4(unpack_nibbles(weight), torch.cat(scales), torch.cat(zeros), bias)
    if scales:
        return pack_int8(weight, torch.cat(scales), bias)
    return pack_bfloat16(weight, bias)
