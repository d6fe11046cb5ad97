from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minigpt.model.attention import CausalAttention
from minigpt.model.config import ModelConfig
from minigpt.model.decoder import Decoder
from minigpt.model.linear import Int8Linear, quantize_module
from minigpt.model.moe import MixtureOfExperts, Router
from minigpt.model.weights import load_model, save_model


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
        "num_experts": 5,
        "experts_per_token": 2,
        "expert_intermediate_size": 24,
    }
    return ModelConfig.model_validate(fields | changes)


def build(config: ModelConfig) -> Decoder:
    model = Decoder(config)
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def layer(config: ModelConfig) -> MixtureOfExperts:
    found = build(config).model.layers[0].mlp
    assert isinstance(found, MixtureOfExperts)
    return found.double()


def hidden(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, 32, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
def test_each_token_is_the_weighted_sum_of_its_experts(kind: str, normalize: bool) -> None:
    mixture = layer(small(mlp=kind, norm_topk_prob=normalize))
    inputs = hidden(2, 7)
    found = mixture(inputs)
    probabilities = (inputs @ mixture.gate.weight.T).softmax(-1)
    for row, token in zip(*torch.where(torch.ones(2, 7)), strict=True):
        best = probabilities[row, token].topk(2)
        weights = best.values / best.values.sum() if normalize else best.values
        expected = sum(
            weight * mixture.experts[str(int(expert))](inputs[row, token])
            for weight, expert in zip(weights, best.indices, strict=True)
        )
        torch.testing.assert_close(found[row, token], expected, rtol=0, atol=1e-12)


def test_an_idle_expert_has_a_gradient_of_zeros() -> None:
    mixture = layer(small())
    assert mixture.gate.bias is not None
    mixture.gate.bias[3] = -10.0
    mixture(hidden(1, 6)).sum().backward()
    idle = [p.grad for p in mixture.experts["3"].parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in idle)
    assert mixture.experts["0"].get_parameter("up_proj.weight").grad is not None


def test_gradients_are_those_of_finite_differences() -> None:
    mixture = layer(small(norm_topk_prob=False, router_bias=False))
    inputs = hidden(1, 3).requires_grad_()
    assert torch.autograd.gradcheck(mixture, inputs)


def test_the_bias_moves_the_choice_and_not_the_weights() -> None:
    router = layer(small(norm_topk_prob=False)).gate
    inputs = hidden(50)
    assert router.bias is not None
    router.bias[4] = 1.0
    choice = router(inputs)
    assert (choice.experts == 4).any(-1).all()
    probabilities = (inputs @ router.weight.T).softmax(-1)
    torch.testing.assert_close(choice.weights, probabilities.gather(-1, choice.experts))


def test_the_load_is_counted_in_training_alone() -> None:
    router = layer(small()).gate
    with torch.no_grad():
        router(hidden(9))
    assert router.load is None
    router(hidden(9))
    router(hidden(9))
    assert router.load is not None and int(router.load.sum()) == 2 * 9 * 2
    load = router.load
    router.balance(load, 0.5)
    assert router.bias is not None and router.load is None
    assert torch.equal(router.bias, 0.5 * torch.sign(load.double().mean() - load))


def test_a_decoder_without_experts_has_none() -> None:
    config = small(num_experts=0)
    names = [name for name, _ in build(config).named_parameters()]
    assert not [name for name in names if "expert" in name or "mlp.gate." in name]


def test_a_router_bias_survives_the_files(tmp_path: Path) -> None:
    model = build(small())
    for module in model.modules():
        if isinstance(module, Router) and module.bias is not None:
            module.bias.copy_(torch.linspace(-1, 1, 5))
    save_model(tmp_path, model, model.config)
    loaded = load_model(tmp_path)
    assert loaded.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor)


@torch.no_grad()
def test_int8_experts_stay_close_and_the_router_is_left_alone() -> None:
    model = build(small())
    tokens, positions = torch.arange(12)[None], torch.arange(12)[None]
    exact = model.logits(model(tokens, positions, CausalAttention()))
    quantize_module(model)
    kinds = {type(m).__name__ for n, m in model.named_modules() if n.endswith("mlp.gate")}
    assert kinds == {"Router"}
    assert isinstance(model.get_submodule("model.layers.0.mlp.experts.0.up_proj"), Int8Linear)
    rough = model.logits(model(tokens, positions, CausalAttention()))
    assert (rough - exact).abs().max() < 0.1 * exact.abs().max()
