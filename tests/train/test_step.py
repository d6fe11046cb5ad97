from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minigpt.data.loader import Batch, BatchLoader
from minigpt.data.shards import TokenDataset
from minigpt.model.decoder import Decoder
from minigpt.train.config import OptimizerConfig
from minigpt.train.optimizer import Optimizer
from minigpt.train.step import NonFiniteError, StepOptions, TrainStep


def _step(model: Decoder, dtype: torch.dtype = torch.float64, compile: bool = False) -> TrainStep:
    optimizer = Optimizer(model, OptimizerConfig(lr=0.01, muon_lr=0.02))
    return TrainStep(model, optimizer, StepOptions(48, dtype, clip_norm=1.0, compile=compile))


def _batch(dataset: Path, rows: int, *, holes: bool = True) -> Batch:
    loader = BatchLoader(
        TokenDataset.open(dataset, "train"), batch_size=rows, sequence_length=32, seed=0
    )
    batch = loader.next_batch()
    if holes:  # rows with very different numbers of targets
        for row in range(rows):
            batch.targets[row, row * 4 :] = -1
    batch.targets[0] = -1 if holes else batch.targets[0]
    return batch


def _rows(batch: Batch, rows: slice) -> Batch:
    return Batch(
        batch.tokens[rows], batch.targets[rows], batch.positions[rows], batch.documents[rows]
    )


def _gradients(model: Decoder) -> list[torch.Tensor]:
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert len(found) == len(list(model.parameters()))
    return found


def test_accumulation_does_not_change_the_gradient(
    small_decoder: Decoder, tiny_dataset: Path
) -> None:
    whole = _batch(tiny_dataset, 8)
    step = _step(small_decoder)
    loss = step.accumulate([whole])
    at_once = _gradients(small_decoder)
    small_decoder.zero_grad()
    quarters = [_rows(whole, slice(start, start + 2)) for start in range(0, 8, 2)]
    accumulated_loss = step.accumulate(quarters)
    assert accumulated_loss == pytest.approx(loss, abs=1e-10)
    for left, right in zip(at_once, _gradients(small_decoder), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-10)


def test_documents_in_a_row_do_not_see_each_other(small_decoder: Decoder) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 256, (1, 24), generator=generator)
    documents = torch.tensor([[0] * 10 + [1] * 14], dtype=torch.int32)
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None]
    targets = torch.randint(0, 256, (1, 24), generator=generator)
    targets[:, :10] = -1  # only the second document counts
    losses = []
    for first_token in (3, 200):
        tokens[0, :10] = first_token
        losses.append(
            _step(small_decoder).accumulate([Batch(tokens, targets, positions, documents)])
        )
    assert losses[0] == losses[1]


def test_training_lowers_the_loss(small_decoder: Decoder, tiny_dataset: Path) -> None:
    step = _step(small_decoder)
    batch = _batch(tiny_dataset, 8, holes=False)
    results = [step.run([batch], 1.0) for _ in range(20)]
    losses = [result.loss for result in results if result]
    assert losses[0] > 5.0 and losses[-1] < 0.7 * losses[0]


def test_a_stop_between_micro_batches_changes_nothing(
    small_decoder: Decoder, tiny_dataset: Path
) -> None:
    batch = _batch(tiny_dataset, 2, holes=False)
    step = _step(small_decoder)
    before = {n: t.clone() for n, t in small_decoder.state_dict().items()}
    answers = iter([False, True])
    assert step.run([batch, batch], 1.0, lambda: next(answers)) is None
    assert all(torch.equal(t, before[n]) for n, t in small_decoder.state_dict().items())
    assert all(p.grad is None for p in small_decoder.parameters())


def test_a_loss_that_is_not_finite_changes_nothing(
    small_decoder: Decoder, tiny_dataset: Path
) -> None:
    with torch.no_grad():
        small_decoder.output_weight[7, 3] = float("nan")
    before = {n: t.clone() for n, t in small_decoder.state_dict().items()}
    with pytest.raises(NonFiniteError, match="loss is nan"):
        _step(small_decoder).run([_batch(tiny_dataset, 2, holes=False)], 1.0)
    for name, tensor in small_decoder.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)


def test_the_gradient_is_clipped(small_decoder: Decoder, tiny_dataset: Path) -> None:
    optimizer = Optimizer(small_decoder, OptimizerConfig(lr=0.01, muon_lr=0.02))
    step = TrainStep(small_decoder, optimizer, StepOptions(48, torch.float64, clip_norm=1e-3))
    step.accumulate([_batch(tiny_dataset, 4)])
    norm = step.clip_gradients()
    assert norm > 1e-3
    clipped = torch.nn.utils.get_total_norm(_gradients(small_decoder))
    assert float(clipped) == pytest.approx(1e-3, rel=1e-3)


def test_compiled_agrees_with_eager(small_decoder: Decoder, tiny_dataset: Path) -> None:
    model = small_decoder.float()
    batch = _batch(tiny_dataset, 4)
    eager = _step(model, torch.float32).accumulate([batch])
    expected = _gradients(model)
    model.zero_grad()
    compiled = _step(model, torch.float32, compile=True).accumulate([batch])
    assert compiled == pytest.approx(eager, rel=1e-5)
    for left, right in zip(expected, _gradients(model), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-6)
