"""Which parameter learns by which rule: Muon for hidden matrices, fused AdamW for the rest.

See `train.muon` for the rule; it scales the update of a matrix by sqrt(max(1, rows / columns)),
so that one rate fits every shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from minigpt.core.errors import ArtifactError
from minigpt.train.config import OptimizerConfig
from minigpt.train.low_bit import make_adamw8bit, restore_part, stored_parts
from minigpt.train.muon import Muon


class Optimizer:
    """One or two torch optimizers that step together, with state kept by parameter name."""

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        """Split `model`'s parameters; `config` is resolved (rates are numbers)."""
        assert config.lr != "auto" and config.muon_lr != "auto"
        self._names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        kinds = _parameter_kinds(model)
        groups = []
        if config.kind == "adamw":
            groups.append(
                {"params": kinds["matrix"], "lr": config.lr, "weight_decay": config.weight_decay}
            )
        groups.append({"params": kinds["embedding"], "lr": config.lr, "weight_decay": 0.0})
        groups.append({"params": kinds["vector"], "lr": config.lr, "weight_decay": 0.0})
        groups = [part for group in groups for part in _by_layout(group)]
        make = make_adamw8bit if config.state_bits == 8 else partial(torch.optim.AdamW, fused=True)
        self._optimizers: list[torch.optim.Optimizer] = [
            make(groups, betas=config.betas, eps=config.eps)
        ]
        if config.kind == "muon" and kinds["matrix"]:
            self._optimizers.append(
                Muon(
                    kinds["matrix"],
                    lr=config.muon_lr,
                    weight_decay=config.weight_decay,
                    momentum=config.momentum,
                )
            )
        self._groups = [g for optimizer in self._optimizers for g in optimizer.param_groups]
        self._peaks = [float(group["lr"]) for group in self._groups]

    def step(self, factor: float) -> None:
        """Update the parameters from their gradients, with `factor` of the peak rates."""
        for group, peak in zip(self._groups, self._peaks, strict=True):
            if isinstance(group["lr"], Tensor):  # compiled into torchao's update
                group["lr"].fill_(peak * factor)
            else:
                group["lr"] = peak * factor
        for optimizer in self._optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state as tensors named `<parameter>/<state>`, without copies."""
        return {
            f"{self._names[parameter]}/{part}": tensor
            for optimizer in self._optimizers
            for parameter, state in optimizer.state.items()
            for key, value in state.items()
            for part, tensor in stored_parts(key, value)
        }

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the state by copies of `tensors`; an empty mapping resets it.

        Raises:
            ArtifactError: A name belongs to no parameter.
        """
        owners = {self._names[p]: (p, o) for o in self._optimizers for p in _parameters(o)}
        for optimizer in self._optimizers:
            optimizer.state.clear()
        for name, value in tensors.items():
            parameter_name, _, key = name.rpartition("/")
            if parameter_name not in owners:
                raise ArtifactError(f"optimizer state {name!r} belongs to no parameter")
            parameter, optimizer = owners[parameter_name]
            restore_part(optimizer, parameter, key, value)


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _by_layout(group: dict[str, Any]) -> list[dict[str, Any]]:
    """Split a group into shards and plain parameters, which the fused update does not mix."""
    shards = [p for p in group["params"] if isinstance(p, DTensor)]
    plain = [p for p in group["params"] if not isinstance(p, DTensor)]
    return [group | {"params": part} for part in (shards, plain) if part]


def _parameter_kinds(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Sort what learns into hidden matrices, embeddings (with the head), and vectors.

    The factors of an adapter count as embeddings: AdamW, no decay. They are no hidden matrices,
    only their product is.
    """
    embedding = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = getattr(model, "output_weight", None)
    kinds: dict[str, list[nn.Parameter]] = {"matrix": [], "embedding": [], "vector": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2:
            kinds["vector"].append(parameter)
        elif id(parameter) in embedding or parameter is head or ".lora_" in name:
            kinds["embedding"].append(parameter)
        else:
            kinds["matrix"].append(parameter)
    return kinds
