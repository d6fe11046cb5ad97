from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt.data.loader import Batch
from minigpt.model.attention import CausalAttention
from minigpt.model.config import LoraConfig
from minigpt.model.decoder import Decoder
from minigpt.model.lora import add_adapters
from minigpt.train.config import OptimizerConfig
from minigpt.train.optimizer import Optimizer
from minigpt.train.preference import AdaptersOff, FrozenCopy, PreferenceObjective, Reference
from minigpt.train.step import StepOptions, TrainStep

BETA = 0.3


@pytest.fixture
def batch() -> Batch:
    """Four pairs whose answers differ in length, some of two runs."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 257, (8, 24), generator=generator)
    targets = torch.full_like(tokens, -1)
    for row in range(8):
        begin, end = 4 + row % 3, 10 + row
        targets[row, begin:end] = tokens.roll(-1, 1)[row, begin:end]
    targets[3, 6] = -1
    positions = torch.arange(24).expand(8, 24)
    return Batch(tokens, targets, positions, torch.zeros(8, 24, dtype=torch.int32))


def other(model: Decoder, seed: int) -> Decoder:
    made = Decoder(model.config)
    made.init_weights(torch.Generator().manual_seed(seed))
    return made.double()


def step(model: Decoder, reference: Reference, smoothing: float = 0.0) -> TrainStep:
    objective = PreferenceObjective(reference, beta=BETA, label_smoothing=smoothing)
    optimizer = Optimizer(model, OptimizerConfig(lr=0.01, muon_lr=0.02, kind="adamw"))
    return TrainStep(model, optimizer, StepOptions(7, torch.float64), objective)


def naive_loss(policy: Decoder, reference: Decoder, batch: Batch, smoothing: float) -> Tensor:
    """Write the paper's formula out, over whole logits."""

    def log_likelihoods(model: Decoder) -> Tensor:
        hidden = model(batch.tokens, batch.positions, CausalAttention())
        found = model.logits(hidden).log_softmax(-1)
        labels = batch.targets.clamp_min(0)[..., None]
        return (found.gather(-1, labels)[..., 0] * (batch.targets != -1)).sum(-1)

    ours, theirs = log_likelihoods(policy), log_likelihoods(reference).detach()
    total = torch.zeros((), dtype=torch.float64)
    for chosen in range(0, len(ours), 2):
        margin = BETA * ((ours[chosen] - theirs[chosen]) - (ours[chosen + 1] - theirs[chosen + 1]))
        total = total - (1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)
    return total / (len(ours) // 2)


def gradients(model: Decoder) -> list[Tensor]:
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_and_gradients_equal_the_papers(
    small_decoder: Decoder, batch: Batch, smoothing: float
) -> None:
    reference = other(small_decoder, 5)
    loss = step(small_decoder, FrozenCopy(reference), smoothing).accumulate([batch])
    found = gradients(small_decoder)
    expected = naive_loss(small_decoder, reference, batch, smoothing)
    expected.backward()  # type: ignore[no-untyped-call]
    assert loss == pytest.approx(float(expected.detach()), abs=1e-10)
    for left, right in zip(found, gradients(small_decoder), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-10)
    assert all(p.grad is None and not p.requires_grad for p in reference.parameters())


def test_accumulation_does_not_change_the_gradient(small_decoder: Decoder, batch: Batch) -> None:
    made = step(small_decoder, FrozenCopy(other(small_decoder, 5)))
    loss = made.accumulate([batch])
    at_once = gradients(small_decoder)
    parts = [
        Batch(
            *(
                t[at : at + 2]
                for t in (batch.tokens, batch.targets, batch.positions, batch.documents)
            )
        )
        for at in range(0, 8, 2)
    ]
    assert made.accumulate(parts) == pytest.approx(loss, abs=1e-10)
    for left, right in zip(at_once, gradients(small_decoder), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-10)


def test_masked_positions_contribute_nothing(small_decoder: Decoder, batch: Batch) -> None:
    """The logits of a place without a target may be anything: only targets are read."""
    losses = []
    for first in (1, 200):
        changed = batch.tokens.clone()
        changed[:, 20:] = first  # after the last target, so that no target sees them
        targets = batch.targets.clone()
        targets[:, 19:] = -1
        made = step(small_decoder, FrozenCopy(other(small_decoder, 5)))
        moved = Batch(changed, targets, batch.positions, batch.documents)
        losses.append((made.accumulate([moved]), gradients(small_decoder)))
    assert losses[0][0] == losses[1][0]
    for left, right in zip(losses[0][1], losses[1][1], strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-12)


def test_at_the_reference_the_loss_is_ln_2_and_falls(small_decoder: Decoder, batch: Batch) -> None:
    reference = other(small_decoder, 5)
    reference.load_state_dict(small_decoder.state_dict())
    made = step(small_decoder, FrozenCopy(reference))
    results = [made.run([batch], 1.0) for _ in range(8)]
    assert all(result is not None for result in results)
    first, last = results[0], results[-1]
    assert first is not None and last is not None
    assert first.loss == pytest.approx(math.log(2), abs=1e-12)
    assert first.metrics == {"margin": pytest.approx(0.0, abs=1e-12), "accuracy": 0.0}
    assert last.loss < first.loss and last.metrics["accuracy"] == 1.0
    assert last.metrics["margin"] > 0.1


def test_a_policy_with_adapters_is_its_own_reference(small_decoder: Decoder, batch: Batch) -> None:
    base = other(small_decoder, 5)
    base.load_state_dict(small_decoder.state_dict())
    add_adapters(small_decoder, LoraConfig(rank=4), torch.Generator().manual_seed(0))
    small_decoder.double()
    made = step(small_decoder, AdaptersOff())
    for _ in range(3):
        made.run([batch], 1.0)
    loss = made.accumulate([batch])
    found = gradients(small_decoder)
    assert len(found) == 2 * 2 * 7
    expected = naive_loss(small_decoder, base, batch, 0.0)
    expected.backward()  # type: ignore[no-untyped-call]
    assert loss == pytest.approx(float(expected.detach()), abs=1e-10)
    assert loss is not None and loss < math.log(2)
    for left, right in zip(found, gradients(small_decoder), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-10)
