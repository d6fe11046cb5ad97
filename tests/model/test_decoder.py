from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from minigpt.model.attention import CausalAttention
from minigpt.model.config import ModelConfig, RopeScaling
from minigpt.model.decoder import Decoder
from minigpt.model.weights import load_model


def small(**changes: object) -> ModelConfig:
    fields: dict[str, object] = {
        "vocab_size": 96,
        "num_layers": 2,
        "hidden_size": 32,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "context_length": 64,
    }
    return ModelConfig.model_validate(fields | changes)


GPT2 = {
    "norm": "layernorm",
    "position": "learned",
    "mlp": "gelu",
    "qkv_bias": True,
    "output_bias": True,
    "mlp_bias": True,
    "qk_norm": False,
}


def build(config: ModelConfig, seed: int = 0) -> Decoder:
    model = Decoder(config)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 96, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, GPT2, {"sliding_window": 3}], ids=["qwen", "gpt2", "win"])
def test_a_document_does_not_see_its_neighbours(changes: dict[str, object]) -> None:
    config = small(**changes)
    model = build(config)
    documents = torch.tensor([[0] * 7 + [1] * 9])
    positions = torch.tensor([[*range(7), *range(9)]])
    tokens = random_tokens(1, 16)
    changed = tokens.clone()
    changed[0, :7] = (changed[0, :7] + 1) % 96

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        attention = CausalAttention(documents, config.sliding_window)
        return model.logits(model(tokens, positions, attention))[0]

    before, after = logits(tokens), logits(changed)
    assert torch.equal(before[7:], after[7:])
    assert (before[:7] != after[:7]).any(dim=-1).all()

    alone = model.logits(
        model(tokens[:, 7:], positions[:, 7:], CausalAttention(None, config.sliding_window))
    )
    torch.testing.assert_close(before[7:], alone[0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_later_tokens_do_not_change_earlier_logits() -> None:
    model = build(small())
    tokens = random_tokens(2, 12)
    positions = torch.arange(12).expand(2, 12)
    changed = tokens.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 96
    before = model(tokens, positions, CausalAttention())
    after = model(changed, positions, CausalAttention())
    assert torch.equal(before[:, :8], after[:, :8])


@torch.no_grad()
def test_rotary_attention_depends_on_distance_alone() -> None:
    scaling = RopeScaling(kind="llama3", factor=8.0, original_context_length=16)
    model = build(small(rope_scaling=scaling))
    tokens = random_tokens(1, 10)
    positions = torch.arange(10)[None]
    near = model(tokens, positions, CausalAttention())
    far = model(tokens, positions + 50, CausalAttention())
    torch.testing.assert_close(near, far, rtol=0, atol=1e-4)


def test_fresh_weights_are_a_function_of_the_generator() -> None:
    first, again, other = build(small(), 5), build(small(), 5), build(small(), 6)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
    assert not torch.equal(first.output_weight, other.output_weight)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, GPT2, {"tie_embeddings": False}])
def test_fresh_weights_start_near_the_uniform_loss(changes: dict[str, object]) -> None:
    model = build(small(hidden_size=128, num_layers=8, num_kv_heads=4, head_dim=32, **changes))
    tokens = random_tokens(4, 32)
    positions = torch.arange(32).expand(4, 32)
    hidden = model(tokens, positions, CausalAttention())
    loss = torch.nn.functional.cross_entropy(
        model.logits(hidden)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    )
    assert abs(float(loss) - math.log(96)) < 0.15
    assert not any(p.isnan().any() for p in model.parameters())


def test_casting_keeps_rotary_frequencies_in_fp32() -> None:
    model = build(small())
    rotary = model.model.rotary
    assert rotary is not None
    before = rotary.inverse_frequencies.clone()
    model.to(torch.bfloat16)
    assert rotary.inverse_frequencies.dtype == torch.float32
    assert torch.equal(rotary.inverse_frequencies, before)


def test_a_decoder_from_meta_equals_one_built_in_place() -> None:
    with torch.device("meta"):
        model = Decoder(small())
    model.to_empty(device="cpu")
    model.init_weights(torch.Generator().manual_seed(0))
    tokens, positions = random_tokens(1, 6), torch.arange(6)[None]
    expected = build(small())(tokens, positions, CausalAttention())
    assert torch.equal(model(tokens, positions, CausalAttention()), expected)


def test_tied_embeddings_learn_from_both_ends() -> None:
    model = build(small(tie_embeddings=True))
    assert model.output_weight is model.model.embed_tokens.weight
    hidden = model(torch.tensor([[3, 3]]), torch.tensor([[0, 1]]), CausalAttention())
    (gradient,) = torch.autograd.grad(model.logits(hidden)[..., 7].sum(), [model.output_weight])
    assert gradient[3].any()  # as an input
    assert gradient[7].any()  # as an output
    assert not gradient[8].any()


@torch.no_grad()
def test_autocast_stays_close_to_fp32() -> None:
    model = build(small())
    tokens, positions = random_tokens(2, 16), torch.arange(16).expand(2, 16)
    exact = model.logits(model(tokens, positions, CausalAttention()))
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model(tokens, positions, CausalAttention())
        assert hidden.dtype == torch.float32  # the residual stream keeps its precision
        rough = model.logits(hidden)
    assert (rough.float() - exact).abs().max() < 0.03 * exact.abs().max()


@torch.no_grad()
def test_flattened_tokens_of_a_batch_give_the_same_hidden_states(tiny_model: Path) -> None:
    """As the engine calls it: (1, N) tokens of several sequences, an attention of its own."""
    loaded = load_model(tiny_model)
    tokens = random_tokens(3, 9)
    positions = torch.arange(9).expand(3, 9)
    expected = loaded.model(tokens, positions, CausalAttention())
    inner = CausalAttention()

    def unflattening(
        layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        rows = (tensor.view(3, 9, *tensor.shape[2:]) for tensor in (query, key, value))
        return inner(layer, *rows).flatten(0, 1)[None]

    flat = loaded.model(tokens.reshape(1, -1), positions.reshape(1, -1), unflattening)
    torch.testing.assert_close(flat.view(3, 9, -1), expected, rtol=0, atol=1e-5)


def test_compiles_to_one_graph_for_every_batch() -> None:
    import torch._dynamo

    torch._dynamo.reset()
    model = build(small())
    graphs = 0

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(model, backend=count, fullgraph=True)  # fullgraph: breaks raise
    for start in range(3):
        tokens = (random_tokens(2, 8) + start) % 96
        documents = (torch.arange(8) > 2 + start).int().expand(2, 8)
        positions = torch.arange(8).expand(2, 8)
        with torch.autocast("cpu", torch.bfloat16):
            found = compiled(tokens, positions, CausalAttention(documents))
            expected = model(tokens, positions, CausalAttention(documents))
        assert torch.equal(found, expected)
    assert graphs == 1
