"""Several low-rank adapters in one batch: the base computes all rows, each adapter adds to its own.

y = W x for all rows at once, then y[rows] += B (A x[rows]) for each adapter in the batch (as
Punica, https://arxiv.org/abs/2310.18547, with torch's own products), so that what is without an
adapter costs no more, and any base serves: packed, int8 or plain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minigpt.core.errors import ModelError
from minigpt.model.config import ModelConfig
from minigpt.model.decoder import Decoder
from minigpt.model.lora import Adapter

_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class _LowRank:
    """One adapter at one layer."""

    down: Tensor
    """A, (R, I)."""
    up: Tensor
    """B times alpha / rank, (O, R)."""


@dataclass
class _Rows:
    """Which rows of the batch that is computed are whose; all adapted layers of a model see it."""

    groups: list[tuple[str, Tensor]]
    """An adapter's digest, and the (M,) rows of the flat batch that it adds to."""


class AdaptedLinear(nn.Module):
    """A linear layer of any kind, with what adapters add to some rows of the batch.

    Args:
        base: Maps (1, N, I) to (1, N, O), a tensor of its own.
        rows: Set anew before each batch.
    """

    def __init__(self, base: nn.Module, rows: _Rows) -> None:
        super().__init__()
        self.base = base
        self.low_rank: dict[str, _LowRank] = {}
        self._rows = rows

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (1, N, I) to (1, N, O)."""
        outputs: Tensor = self.base(inputs)
        for digest, rows in self._rows.groups:
            if (adapter := self.low_rank.get(digest)) is not None:
                inner = inputs[0].index_select(0, rows) @ adapter.down.T
                outputs[0].index_add_(0, rows, inner @ adapter.up.T)
        return outputs


class AdapterSet:
    """The adapters on one model.

    Args:
        model: In eval mode, on its device; its layers are wrapped as adapters come for them.
        dtype: Of its activations.
    """

    def __init__(self, model: Decoder, dtype: torch.dtype) -> None:
        self._model = model
        self._dtype = dtype
        self._device = next(iter(model.state_dict().values())).device
        self._rows = _Rows([])

    def add(self, digest: str, adapter: Adapter) -> None:
        """Put on an adapter that `check_adapter` accepts; it adds nothing until rows use it."""
        scaling = adapter.config.alpha / adapter.config.rank
        for name, down in adapter.tensors.items():
            layer, _, rest = name.rpartition(".lora_A.")
            if not layer:
                continue
            up = adapter.tensors[f"{layer}.lora_B.{rest}"].float() * scaling
            self._wrapped(layer).low_rank[digest] = _LowRank(self._placed(down), self._placed(up))

    def remove(self, digest: str) -> None:
        """Take off an adapter and free its memory."""
        for module in self._model.modules():
            if isinstance(module, AdaptedLinear):
                module.low_rank.pop(digest, None)

    def use(self, rows: Mapping[str, Sequence[int]]) -> None:
        """Say which rows of the next batch each adapter adds to; the others have none."""
        self._rows.groups = [
            (digest, torch.tensor(list(its), device=self._device)) for digest, its in rows.items()
        ]

    def _wrapped(self, layer: str) -> AdaptedLinear:
        owner, _, attribute = layer.rpartition(".")
        parent = self._model.get_submodule(owner)
        base = getattr(parent, attribute)
        if not isinstance(base, AdaptedLinear):
            base = AdaptedLinear(base, self._rows)
            setattr(parent, attribute, base)
        return base

    def _placed(self, tensor: Tensor) -> Tensor:
        return tensor.to(device=self._device, dtype=self._dtype)


def check_adapter(adapter: Adapter, model: ModelConfig) -> None:
    """Refuse an adapter that is not for a model of this shape.

    Raises:
        ModelError: It has other layers or shapes, or adapts experts, whose rows are not the
            batch's.
    """
    if model.num_experts and (experts := sorted(set(adapter.config.targets) & set(_MLP))):
        raise ModelError(
            f"the adapter targets {', '.join(experts)} of experts, which can't be served beside "
            "the base",
            remedy="merge it with `minigpt models merge-adapter`",
        )
    with torch.device("meta"):
        skeleton = Decoder(model)
    adapter.prepare(skeleton)
