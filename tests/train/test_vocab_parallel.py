from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import TorchDispatchMode

from minigpt.train.config import MeshConfig
from minigpt.train.objective import IGNORED_TARGET
from minigpt.train.processes import Ranks, mesh_of
from minigpt.train.vocab_parallel import vocab_parallel_cross_entropy_sum

ROWS, LENGTH, WIDTH, VOCAB = 3, 8, 16, 48


def _inputs(vocab: int = VOCAB) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, LENGTH, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, WIDTH, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, vocab, (ROWS, LENGTH), generator=generator)
    targets[:, ::3] = IGNORED_TARGET
    return hidden, weight, targets


def _sharded(chunk_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, targets = _inputs()
    mesh = mesh_of(MeshConfig(tp=2)).submesh("tp")
    assert mesh is not None
    rank = dist.get_rank()
    part = hidden.chunk(2, dim=1)[rank].clone().requires_grad_()
    shard = weight.chunk(2)[rank].clone()
    output = DTensor.from_local(shard, mesh, [Shard(0)])
    output.requires_grad_()
    loss = vocab_parallel_cross_entropy_sum(part, output, targets, chunk_tokens=chunk_tokens)
    grads = torch.autograd.grad(3 * loss, [part, output])
    local = grads[1].to_local() if isinstance(grads[1], DTensor) else grads[1]
    return loss.detach(), grads[0], local


def test_loss_and_gradients_equal_the_plain_ones(two_ranks: Ranks) -> None:
    hidden, weight, targets = _inputs()
    hidden.requires_grad_()
    weight.requires_grad_()
    plain = F.cross_entropy(
        (hidden @ weight.T).flatten(0, 1),
        targets.flatten(),
        reduction="sum",
        ignore_index=IGNORED_TARGET,
    )
    expected = torch.autograd.grad(3 * plain, [hidden, weight])
    for chunk_tokens in (1, 5, 100):
        for rank, (loss, hidden_grad, weight_grad) in enumerate(
            two_ranks.run(_sharded, chunk_tokens)
        ):
            torch.testing.assert_close(loss, plain.detach(), rtol=1e-12, atol=1e-12)
            part = expected[0].chunk(2, dim=1)[rank]
            torch.testing.assert_close(hidden_grad, part, rtol=0, atol=1e-12)
            shard = expected[1].chunk(2)[rank]
            torch.testing.assert_close(weight_grad, shard, rtol=0, atol=1e-12)


class _LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in itertools.chain([result], result if isinstance(result, tuple | list) else ()):
            if isinstance(value, Tensor) and not isinstance(value, DTensor):
                self.numel = max(self.numel, value.numel())
        return result


def _largest() -> int:
    vocab, chunk = 4096, 4
    hidden, weight, targets = _inputs(vocab)
    mesh = mesh_of(MeshConfig(tp=2)).submesh("tp")
    assert mesh is not None
    part = hidden.chunk(2, dim=1)[dist.get_rank()].clone().requires_grad_()
    shard = weight.chunk(2)[dist.get_rank()].clone()
    output = DTensor.from_local(shard, mesh, [Shard(0)])
    output.requires_grad_()
    with _LargestTensor() as watch:  # type: ignore[no-untyped-call]
        loss = vocab_parallel_cross_entropy_sum(part, output, targets, chunk_tokens=chunk)
        loss.backward()  # type: ignore[no-untyped-call]
    return int(watch.numel)


def test_neither_whole_logits_nor_the_whole_vocabulary_exist(two_ranks: Ranks) -> None:
    for largest in two_ranks.run(_largest):
        assert largest <= 4096 // 2 * WIDTH < ROWS * LENGTH * 4096
