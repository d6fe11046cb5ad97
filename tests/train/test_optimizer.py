from __future__ import annotations

import pytest
import torch

from minigpt.core.errors import ArtifactError
from minigpt.model.decoder import Decoder
from minigpt.train.config import OptimizerConfig
from minigpt.train.optimizer import Optimizer


def _fake_gradients(model: Decoder, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def _copy(model: Decoder) -> Decoder:
    twin = Decoder(model.config).double()
    twin.load_state_dict(model.state_dict())
    return twin


def test_muon_takes_hidden_matrices_and_nothing_else(small_decoder: Decoder) -> None:
    optimizer = Optimizer(small_decoder, OptimizerConfig(kind="muon", lr=0.01, muon_lr=0.02))
    _fake_gradients(small_decoder, 0)
    optimizer.step(1.0)
    by_muon = {n.split("/")[0] for n in optimizer.state_dict() if n.endswith("/momentum_buffer")}
    by_adamw = {n.split("/")[0] for n in optimizer.state_dict() if n.endswith("/exp_avg")}
    projections = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert len(by_muon) == 7 * small_decoder.config.num_layers
    assert all(name.split(".")[-2] in projections for name in by_muon)
    assert by_muon | by_adamw == {name for name, _ in small_decoder.named_parameters()}
    assert not by_muon & by_adamw


def test_muon_update_is_nearly_orthogonal(small_decoder: Decoder) -> None:
    config = OptimizerConfig(kind="muon", lr=0.01, muon_lr=0.5, weight_decay=0.0)
    optimizer = Optimizer(small_decoder, config)
    weight = small_decoder.get_parameter("model.layers.0.self_attn.q_proj.weight")
    before = weight.detach().clone()
    _fake_gradients(small_decoder, 0)
    optimizer.step(0.1)
    singular = torch.linalg.svdvals((weight.detach() - before) / 0.05)
    # Five Newton-Schulz steps bring every singular value near 1, not onto it.
    assert singular.min() > 0.5 and singular.max() < 1.5


def test_adamw_is_torchs_and_decays_matrices_only(small_decoder: Decoder) -> None:
    twin = _copy(small_decoder)
    config = OptimizerConfig(kind="adamw", lr=0.01, muon_lr=0.02, weight_decay=0.3)
    ours = Optimizer(small_decoder, config)
    matrices = [p for n, p in twin.named_parameters() if p.ndim == 2 and "_proj" in n]
    others = [p for n, p in twin.named_parameters() if p.ndim == 1 or "_proj" not in n]
    theirs = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}],
        lr=0.005,
        betas=config.betas,
        eps=config.eps,
    )
    for seed in range(3):
        _fake_gradients(small_decoder, seed)
        _fake_gradients(twin, seed)
        ours.step(0.5)
        theirs.step()
    for left, right in zip(small_decoder.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_state_goes_on_bit_for_bit(small_decoder: Decoder, kind: str) -> None:
    config = OptimizerConfig.model_validate({"kind": kind, "lr": 0.01, "muon_lr": 0.02})
    optimizer = Optimizer(small_decoder, config)
    _fake_gradients(small_decoder, 0)
    optimizer.step(1.0)
    twin = _copy(small_decoder)
    resumed = Optimizer(twin, config)
    resumed.load_state_dict({n: t.clone() for n, t in optimizer.state_dict().items()})
    for model, either in ((small_decoder, optimizer), (twin, resumed)):
        _fake_gradients(model, 1)
        either.step(0.7)
    for left, right in zip(small_decoder.parameters(), twin.parameters(), strict=True):
        assert torch.equal(left, right)


def test_a_foreign_state_is_refused_and_an_empty_one_resets(small_decoder: Decoder) -> None:
    optimizer = Optimizer(small_decoder, OptimizerConfig(lr=0.01, muon_lr=0.02))
    with pytest.raises(ArtifactError, match="no_such"):
        optimizer.load_state_dict({"no_such/exp_avg": torch.zeros(1)})
    _fake_gradients(small_decoder, 0)
    optimizer.step(1.0)
    optimizer.load_state_dict({})
    assert optimizer.state_dict() == {}
