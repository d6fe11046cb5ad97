"""The kernels' runner against torch's: the same logits, whatever the family and the batch."""

from __future__ import annotations

import copy
import functools
import statistics
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from minigpt.api.requests import Request
from minigpt.core.errors import ModelError
from minigpt.engine.batch import Chunk
from minigpt.engine.blocks import BlockManager
from minigpt.engine.native import NativeRunner, Runner, make_runner, not_covered
from minigpt.engine.runner import ModelRunner
from minigpt.engine.sequence import Sequence
from minigpt.kernels import library
from minigpt.kernels.cache_format import CacheFormat
from minigpt.kernels.linear import rounded_inputs
from minigpt.model.config import ModelConfig, RopeScaling
from minigpt.model.decoder import Decoder
from minigpt.model.linear import Int4Linear, Int8Linear, quantize_module
from minigpt.model.weights import LoadedModel

pytestmark = pytest.mark.skipif(library.loaded() is None, reason="no kernels here")

VOCABULARY, NUM_BLOCKS, BLOCK_SIZE = 97, 128, 16
Logits = dict[tuple[int, int], Tensor]
"""Those of (prompt, position)."""

BASE = ModelConfig(
    vocab_size=VOCABULARY, num_layers=2, hidden_size=48, num_heads=4, num_kv_heads=2, head_dim=16,
    intermediate_size=80, context_length=512, qk_norm=False, tie_embeddings=False,
)  # fmt: skip
WIDE = BASE.replace(hidden_size=128, intermediate_size=256)
"""Whose inputs are whole int4 groups of any size."""
FAMILIES = {
    "llama": BASE.replace(
        rope_theta=500_000.0, rope_scaling=RopeScaling(kind="llama3", factor=8.0), norm_eps=1e-5
    ),
    "mistral": BASE.replace(sliding_window=40, num_kv_heads=1),
    "qwen2": BASE.replace(qkv_bias=True, tie_embeddings=True),
    "qwen3": BASE.replace(qk_norm=True, tie_embeddings=True, head_dim=32),
    "gpt2": BASE.replace(
        norm="layernorm", position="learned", mlp="gelu", qkv_bias=True, output_bias=True,
        mlp_bias=True, tie_embeddings=True, num_kv_heads=4,
    ),
}  # fmt: skip


def make_model(
    config: ModelConfig, *, quantized: bool = False, group_size: int | None = None
) -> Decoder:
    """Return a model in bfloat16, biases and norms not at their first values."""
    generator = torch.Generator().manual_seed(0)
    model = Decoder(config)
    model.init_weights(generator)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    if quantized:
        quantize_module(model, group_size)
    return model.bfloat16().eval()


def make_runners(
    model: Decoder,
    dtype: torch.dtype,
    cache_format: CacheFormat | None = None,
    activation_bits: Literal[8, 16] = 16,
) -> tuple[NativeRunner, ModelRunner]:
    """Return the kernels' runner, and torch's in float32 over the same weights."""
    wide = copy.deepcopy(model).float()
    theirs = ModelRunner.with_cache(
        wide, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, dtype=torch.float32
    )
    ours = NativeRunner(
        model,
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        dtype=dtype,
        cache_format=cache_format,
        activation_bits=activation_bits,
    )
    return ours, theirs


def make_prompts(lengths: list[int]) -> list[list[int]]:
    made = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, (n,), generator=made).tolist() for n in lengths]


def compute(runner: Runner, prompts: list[list[int]], sizes: list[int]) -> Logits:
    """Compute all prompts together in chunks of those sizes, in turn; return the chunks' logits."""
    blocks = BlockManager(NUM_BLOCKS, BLOCK_SIZE)
    sequences = []
    for number, prompt in enumerate(prompts):
        request = Request(id=str(number), prompt_token_ids=prompt)
        sequence = Sequence.from_request(request, 0, number, seed=0)
        sequence.block_table = blocks.allocate(-(-len(prompt) // BLOCK_SIZE))
        sequences.append(sequence)
    found: Logits = {}
    step = 0
    while any(sequence.num_remaining for sequence in sequences):
        chunks = []
        for sequence in sequences:
            size = sizes[(step + sequence.arrival) % len(sizes)]
            if length := min(size, sequence.num_remaining):
                chunks.append(Chunk(sequence, sequence.num_computed, length, True))
        logits, sampled = runner.run(chunks)
        for chunk in chunks:
            row = sampled.index(chunk.sequence)
            found[chunk.sequence.arrival, chunk.stop] = logits[row]
            chunk.sequence.num_computed = chunk.stop
        step += 1
    return found


def greatest_difference(ours: Logits, theirs: Logits) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[key] - theirs[key]).abs().max()) for key in ours)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_torchs(level: str, family: str) -> None:
    """Prompts of several lengths, chunk by chunk and token by token, all positions compared."""
    model = make_model(FAMILIES[family])
    assert not_covered(model, torch.bfloat16, BLOCK_SIZE) is None
    ours, theirs = make_runners(model, torch.float32)
    prompts = make_prompts([70, 1, 23])
    sizes = [30, 1, 1, 17]
    difference = greatest_difference(compute(ours, prompts, sizes), compute(theirs, prompts, sizes))
    assert difference < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_close(family: str) -> None:
    model = make_model(FAMILIES[family])
    rounded = copy.deepcopy(model)
    ours, theirs = make_runners(model, torch.bfloat16)
    torchs = ModelRunner.with_cache(
        rounded, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, dtype=torch.bfloat16
    )
    prompts, sizes = make_prompts([70, 23]), [30, 1]
    exact = compute(theirs, prompts, sizes)
    difference = greatest_difference(compute(ours, prompts, sizes), exact)
    assert difference < 1.5 * greatest_difference(compute(torchs, prompts, sizes), exact) + 1e-3


@pytest.mark.parametrize(
    ("config", "group_size"),
    [
        (FAMILIES["qwen2"], None),
        (WIDE, 32),
        (WIDE.replace(norm="layernorm", mlp="gelu", qkv_bias=True, mlp_bias=True), 64),
        (WIDE.replace(qk_norm=True, tie_embeddings=True), 128),
    ],
)
def test_integer_weights(level: str, config: ModelConfig, group_size: int | None) -> None:
    """The kernels round the inputs of integer weights to 16 bits, which is what remains."""
    model = make_model(config, quantized=True, group_size=group_size)
    kinds = {type(module) for module in model.modules()}
    assert (Int4Linear in kinds) == (group_size is not None)
    ours, theirs = make_runners(model, torch.float32)
    assert ours.activation_bits == 16 and theirs.activation_bits is None
    prompts, sizes = make_prompts([40, 9]), [16, 1]
    difference = greatest_difference(compute(ours, prompts, sizes), compute(theirs, prompts, sizes))
    assert difference < 2e-3


@pytest.mark.parametrize("group_size", [None, 32])
def test_eight_bit_activations_are_the_rounded_ones_of_a_reference(
    level: str, group_size: int | None
) -> None:
    """Torch computes the same where each integer layer's inputs are rounded before it."""
    model = make_model(WIDE.replace(num_layers=1), quantized=True, group_size=group_size)
    plain = copy.deepcopy(model)
    ours, theirs = make_runners(model, torch.float32, activation_bits=8)
    assert ours.activation_bits == 8
    for module in theirs._model.modules():
        if isinstance(module, Int8Linear | Int4Linear):
            group = module.group_size if isinstance(module, Int4Linear) else 128
            module.register_forward_pre_hook(functools.partial(_round, group))
    prompts, sizes = make_prompts([40, 9]), [16, 1]
    rounded = compute(ours, prompts, sizes)
    _, exact = make_runners(plain, torch.float32)
    same, other = compute(theirs, prompts, sizes), compute(exact, prompts, sizes)

    def median(theirs: Logits) -> float:
        return statistics.median(float((rounded[k] - theirs[k]).abs().max()) for k in rounded)

    # Not all: where sums of other order put an input on the other side of a half, it's a step off.
    assert median(same) < 0.1 * median(other) and 1e-3 < median(other) < 0.1


def _round(group: int, module: nn.Module, given: tuple[Tensor]) -> Tensor:
    (inputs,) = given
    return rounded_inputs(inputs.flatten(0, -2), group, 8).view_as(inputs)


def _loaded(model: Decoder) -> LoadedModel:
    return LoadedModel(model, model.config, Path(), "")


def test_eight_bit_activations_are_refused_where_nothing_rounds() -> None:
    def make(config: ModelConfig, *, quantized: bool) -> Runner:
        model = make_model(config, quantized=quantized)
        return make_runner(
            model, num_blocks=4, block_size=BLOCK_SIZE, dtype=torch.bfloat16, adapters=False,
            activation_bits=8,
        )  # fmt: skip

    with pytest.raises(ModelError, match=r"activation_bits = 8 .*the model has none.*compress"):
        make(BASE, quantized=False)
    with pytest.raises(ModelError, match=r"torch serves here: heads of 8, .*leave activation_bits"):
        make(BASE.replace(head_dim=8), quantized=True)
    runner = make(BASE, quantized=True)
    assert isinstance(runner, NativeRunner) and runner.activation_bits == 8
    with pytest.raises(ModelError, match="the model has none"):
        runner.with_model(_loaded(make_model(BASE)))
    swapped = runner.with_model(_loaded(make_model(BASE, quantized=True)))
    assert swapped.activation_bits == 8


def test_int8_cache() -> None:
    ours, theirs = make_runners(make_model(FAMILIES["qwen3"]), torch.float32, "int8")
    prompts, sizes = make_prompts([70, 23]), [30, 1]
    difference = greatest_difference(compute(ours, prompts, sizes), compute(theirs, prompts, sizes))
    assert 1e-5 < difference < 0.02


@pytest.mark.usefixtures("threads")
@given(
    others=st.lists(st.integers(1, 60), min_size=0, max_size=16),
    sizes=st.lists(st.sampled_from([1, 2, 7, 32, 200]), min_size=1, max_size=4),
    family=st.sampled_from(["mistral", "qwen3"]),
    threads=st.integers(1, 3),
    cache_format=st.sampled_from(["bfloat16", "int8"]),
)
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_an_answer_depends_on_its_prompt_alone(
    others: list[int], sizes: list[int], family: str, threads: int, cache_format: CacheFormat
) -> None:
    """Alone, or beside others and cut otherwise: the same bits at every position both computed."""
    runner = NativeRunner(
        make_model(FAMILIES[family]), num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE,
        dtype=torch.bfloat16, cache_format=cache_format,
    )  # fmt: skip
    prompts = make_prompts([200, *others])
    torch.set_num_threads(1)
    alone = compute(runner, prompts[:1], [150, *[1] * 49])
    torch.set_num_threads(threads)
    together = compute(runner, prompts, [*sizes, 1])
    shared = [key for key in together if key in alone]
    assert (0, 200) in shared
    for key in shared:
        assert torch.equal(alone[key], together[key])


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("group_size", [None, 32])
def test_so_it_does_with_integer_weights(group_size: int | None, bits: Literal[8, 16]) -> None:
    """Inputs are rounded row by row, whatever is beside a row."""
    model = make_model(WIDE, quantized=True, group_size=group_size)
    runner = NativeRunner(
        model, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, dtype=torch.bfloat16,
        activation_bits=bits,
    )  # fmt: skip
    prompts = make_prompts([90, 40, 7, 33])
    alone = compute(runner, prompts[:1], [60, *[1] * 29])
    together = compute(runner, prompts, [5, 32, 1])
    shared = [key for key in together if key in alone]
    assert (0, 90) in shared
    assert all(torch.equal(alone[key], together[key]) for key in shared)


def test_rows_without_logits_are_computed_too() -> None:
    ours, _ = make_runners(make_model(BASE), torch.float32)
    sequence = Sequence.from_request(Request(id="0", prompt_token_ids=[1] * 20), 0, 0, seed=0)
    sequence.block_table = [3, 5]
    logits, sampled = ours.run([Chunk(sequence, 0, 10, False)])
    assert logits.shape == (0, VOCABULARY) and sampled == []
    logits, sampled = ours.run([Chunk(sequence, 10, 10, True)])
    assert sampled == [sequence]
    whole, _ = ours.run([Chunk(sequence, 0, 20, True)])
    assert torch.equal(logits, whole)


def test_clear_removes_nans() -> None:
    model = make_model(BASE)
    model.state_dict()["model.layers.0.self_attn.v_proj.weight"][0, 0] = float("nan")
    ours, _ = make_runners(model, torch.bfloat16)
    sequence = Sequence.from_request(Request(id="0", prompt_token_ids=[1] * 5), 0, 0, seed=0)
    sequence.block_table = [2]
    logits, _ = ours.run([Chunk(sequence, 0, 5, True)])
    assert not logits.isfinite().any()
    assert any(cache[2].any() for cache in ours._caches)
    ours.clear(sequence.block_table)
    assert not any(cache.any() for cache in ours._caches)


def test_the_model_gives_up_its_weights() -> None:
    model = make_model(BASE)
    make_runners(model, torch.bfloat16)
    held = {name for name, value in model.state_dict().items() if value.device.type != "meta"}
    assert held == {"model.embed_tokens.weight", "model.norm.weight"}


@pytest.mark.parametrize(
    ("config", "change", "reason"),
    [
        (BASE.replace(num_experts=2), None, "mixtures of experts"),
        (BASE.replace(head_dim=8), None, "heads of 8, 4 over 2, in blocks of 16 tokens"),
        (BASE, "float", "is torch.float32: the kernels' floating-point weights are bfloat16"),
    ],
)
def test_what_is_not_covered_runs_on_torch(
    config: ModelConfig, change: str | None, reason: str
) -> None:
    model = Decoder(config)
    model.init_weights(torch.Generator().manual_seed(0))
    model = model.eval() if change == "float" else model.bfloat16().eval()
    found = not_covered(model, torch.bfloat16, BLOCK_SIZE)
    assert found is not None and reason in found
    runner = make_runner(
        model, num_blocks=4, block_size=BLOCK_SIZE, dtype=torch.bfloat16, adapters=False
    )
    assert isinstance(runner, ModelRunner)


def test_float32_is_torchs() -> None:
    found = not_covered(make_model(BASE), torch.float32, BLOCK_SIZE)
    assert found == "torch.float32 is torch's: the kernels' floating-point weights are bfloat16"


def test_without_the_library_torch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    absence = library.Absence("no library", remedy="build it")
    monkeypatch.setattr(library, "find", lambda: absence)
    assert not_covered(make_model(BASE), torch.bfloat16, BLOCK_SIZE) == "no library"


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_hidden_states_are_the_same_where_logits_are_wanted_too(
    family: str, num_threads: int
) -> None:
    """All rows at once: no room is taken twice for a row that is wanted for both."""
    ours, _ = make_runners(make_model(FAMILIES[family]), torch.bfloat16)
    (prompt,) = make_prompts([64])
    torch.set_num_threads(num_threads)
    rows, blocks = list(range(64)), list(range(4))
    _, expected = ours._step.run(prompt, [(0, 64, 0, 0)], blocks, [], rows)
    for _ in range(20):
        logits, hidden = ours._step.run(prompt, [(0, 64, 0, 0)], blocks, [63, 5], rows)
        assert torch.equal(hidden, expected)
        assert torch.equal(ours._step.project(hidden[[63, 5]]), logits)
