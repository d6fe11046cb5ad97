from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minigpt.data.loader import Batch, BatchLoader
from minigpt.data.shards import TokenDataset
from minigpt.model.attention import CausalAttention
from minigpt.model.decoder import Decoder
from minigpt.train.config import OptimizerConfig
from minigpt.train.distillation import DistillationObjective, Divergence, distillation_sum
from minigpt.train.optimizer import Optimizer
from minigpt.train.step import StepOptions, TrainStep

DIVERGENCES = get_args(Divergence)


def inputs(tokens: int = 37) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    targets = torch.randint(0, 50, (tokens,), generator=generator)
    targets[::5] = -1
    hidden, weight = draw(tokens, 16).requires_grad_(), draw(50, 16).requires_grad_()
    return hidden, weight, draw(tokens, 24), draw(50, 24), targets


def naive(
    student: Tensor, teacher: Tensor, targets: Tensor, kind: str, temperature: float, mix: float
) -> Tensor:
    """Write the definitions out, differentiated by autograd."""
    s, t = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    m = (s + t) / 2
    gap = {
        "forward-kl": (t * (t / s).log()).sum(-1),
        "reverse-kl": (s * (s / t).log()).sum(-1),
        "jsd": ((t * (t / m).log()).sum(-1) + (s * (s / m).log()).sum(-1)) / 2,
    }[kind]
    entropy = F.cross_entropy(student, targets, ignore_index=-1, reduction="none")
    valid = targets != -1
    return (mix * temperature**2 * gap * valid + (1 - mix) * entropy).sum()


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize(("temperature", "mix"), [(1.0, 1.0), (2.5, 0.7)])
@pytest.mark.parametrize("chunk_tokens", [8, 1000])
def test_loss_and_gradients_equal_the_definitions(
    kind: Divergence, temperature: float, mix: float, chunk_tokens: int
) -> None:
    hidden, weight, teacher_hidden, teacher_weight, targets = inputs()
    loss = distillation_sum(
        hidden,
        weight,
        teacher_hidden,
        teacher_weight,
        targets,
        divergence=kind,
        temperature=temperature,
        mix=mix,
        chunk_tokens=chunk_tokens,
    )
    found = torch.autograd.grad(3 * loss, [hidden, weight])
    plain = naive(
        hidden @ weight.T, teacher_hidden @ teacher_weight.T, targets, kind, temperature, mix
    )
    expected = torch.autograd.grad(3 * plain, [hidden, weight])
    torch.testing.assert_close(loss, plain, rtol=0, atol=1e-10)
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-10)
    assert not found[0][targets == -1].any()


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(kind: Divergence) -> None:
    hidden, weight, _, _, targets = inputs()
    loss = distillation_sum(
        hidden,
        weight,
        hidden.detach(),
        weight.detach(),
        targets,
        divergence=kind,
        temperature=2.0,
        mix=1.0,
        chunk_tokens=16,
    )
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-10)
    for gradient in torch.autograd.grad(loss, [hidden, weight]):
        assert float(gradient.abs().max()) < 1e-10


class _LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in itertools.chain([result], result if isinstance(result, tuple) else ()):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return result


def test_full_logits_never_exist() -> None:
    tokens, vocab, width, chunk = 512, 1000, 8, 16
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(vocab, width, requires_grad=True)
    with _LargestTensor() as watch:  # type: ignore[no-untyped-call]
        distillation_sum(
            hidden,
            weight,
            torch.randn(tokens, width),
            torch.randn(vocab, width),
            torch.randint(0, vocab, (tokens,)),
            divergence="jsd",
            temperature=1.0,
            mix=0.5,
            chunk_tokens=chunk,
        ).backward()  # type: ignore[no-untyped-call]
    assert watch.numel <= max(chunk * vocab, vocab * width, tokens * width)


def test_a_step_equals_the_definition_and_does_not_depend_on_accumulation(
    small_decoder: Decoder, tiny_dataset: Path
) -> None:
    teacher = Decoder(small_decoder.config)
    teacher.init_weights(torch.Generator().manual_seed(9))
    teacher.double()
    objective = DistillationObjective(teacher, divergence="forward-kl", temperature=2.0, weight=0.6)
    optimizer = Optimizer(small_decoder, OptimizerConfig(lr=0.01, muon_lr=0.02))
    step = TrainStep(small_decoder, optimizer, StepOptions(48, torch.float64), objective)
    dataset = TokenDataset.open(tiny_dataset, "train")
    batch = BatchLoader(dataset, batch_size=4, sequence_length=32, seed=0).next_batch()
    batch.targets[1, 5:] = -1
    loss = step.accumulate([batch])
    at_once = [p.grad.clone() for p in small_decoder.parameters() if p.grad is not None]
    small_decoder.zero_grad()

    attention = CausalAttention(batch.documents)
    student, frozen = (
        model.logits(model(batch.tokens, batch.positions, attention)).flatten(0, 1)
        for model in (small_decoder, teacher)
    )
    targets = batch.targets.flatten()
    plain = naive(student, frozen.detach(), targets, "forward-kl", 2.0, 0.6)
    plain = plain / int((targets != -1).sum())
    plain.backward()  # type: ignore[no-untyped-call]
    assert loss == pytest.approx(float(plain.detach()), abs=1e-10)
    for parameter, gradient in zip(small_decoder.parameters(), at_once, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(gradient, parameter.grad, rtol=0, atol=1e-10)
    assert all(p.grad is None for p in teacher.parameters())
    small_decoder.zero_grad()

    names = ("tokens", "targets", "positions", "documents")
    quarters = [Batch(*(getattr(batch, n)[r : r + 1] for n in names)) for r in range(4)]
    assert step.accumulate(quarters) == pytest.approx(loss, abs=1e-10)
    for parameter, gradient in zip(small_decoder.parameters(), at_once, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(gradient, parameter.grad, rtol=0, atol=1e-10)
