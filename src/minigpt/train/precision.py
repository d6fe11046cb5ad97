"""Number types of matrix products below bfloat16, and where they may be used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from minigpt.core.errors import ConfigError
from minigpt.model.decoder import Decoder
from minigpt.model.weights import DTYPES
from minigpt.train.config import TrainConfig
from minigpt.train.gradients import local_gradients

_HIGHEST, _LOWEST = 2.0**24, 2.0**-14
_GROW_AFTER = 2000


class LossScale:
    """Multiplies the loss so that float16 gradients neither vanish nor overflow.

    Halved when a gradient is not finite, whereupon the step is done again; doubled after 2,000
    steps without (https://arxiv.org/abs/1710.03740). Its state is part of a checkpoint.
    """

    def __init__(self, scale: float = 2.0**16) -> None:
        self.scale = scale
        self._steps = 0

    def lower(self) -> bool:
        """Halve the scale; False where it is too low already to be the cause."""
        if self.scale <= _LOWEST:
            return False
        self.scale /= 2
        self._steps = 0
        return True

    def succeeded(self) -> None:
        """Count a step that was finite."""
        self._steps += 1
        if self._steps >= _GROW_AFTER and self.scale < _HIGHEST:
            self.scale *= 2
            self._steps = 0

    def unscale(self, parameters: Sequence[nn.Parameter]) -> None:
        """Divide the gradients by the scale, a power of two: exact but for underflow."""
        torch._foreach_mul_(local_gradients(parameters), 1 / self.scale)

    def state(self) -> dict[str, float]:
        """Return what a resumed run needs."""
        return {"scale": self.scale, "steps": self._steps}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state()`."""
        self.scale, self._steps = float(state["scale"]), int(state["steps"])


def product_dtype(precision: str) -> torch.dtype:
    """Return the type that autocast gives to matrix products; float8 layers take bfloat16."""
    return DTYPES["bfloat16" if precision == "float8" else precision]


def check_precision(precision: str, device: str) -> None:
    """Refuse a precision that the device has no hardware for.

    Raises:
        ConfigError: float16 on a CPU; float8 anywhere but on Hopper or later.
    """
    if precision == "float16" and device == "cpu":
        raise ConfigError(
            "precision = float16 on a CPU: its products are emulated, about 100 times slower than "
            "bfloat16",
            remedy="--set precision=bfloat16",
        )
    if precision != "float8":
        return
    if device == "cpu":
        raise ConfigError(
            "precision = float8 needs an NVIDIA GPU of compute capability 9.0 or later (Hopper), "
            "and this run is on the CPU",
            remedy="--set precision=bfloat16",
        )
    capability = torch.cuda.get_device_capability()
    if capability < (9, 0):
        raise ConfigError(
            "precision = float8 needs compute capability 9.0 or later (Hopper), and "
            f"{torch.cuda.get_device_name()} has {capability[0]}.{capability[1]}",
            remedy="--set precision=bfloat16",
        )


def check_offload(config: TrainConfig, device: str) -> None:
    """Refuse to move to the CPU what is there already, or what is not sharded.

    Raises:
        ConfigError: Offload on a CPU, or of an optimizer without mesh.fsdp.
    """
    for name in ("offload_activations", "offload_optimizer"):
        if getattr(config.memory, name) and device == "cpu":
            raise ConfigError(
                f"memory.{name} = true on a CPU is meaningless: everything is in its memory anyway",
                remedy=f"--set memory.{name}=false",
            )
    if config.memory.offload_optimizer and config.mesh.fsdp == 1:
        raise ConfigError(
            "memory.offload_optimizer = true needs mesh.fsdp > 1, whose shards are what moves",
            remedy="use mesh.fsdp, or --set optimizer.state_bits=8",
        )


def use_float8(model: Decoder) -> None:
    """Let the layers' linear maps compute in float8 with a scale for each row, by torchao.

    Weights, gradients and optimizer state stay as they are; the loss and the embedding do not
    take part. Unmeasured: no such GPU has run it.

    Raises:
        ConfigError: torchao is not installed.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        raise ConfigError(
            "precision = float8 needs torchao", remedy='pip install "minigpt[lowbit]"'
        ) from None
    convert_to_float8_training(
        model.model.layers, config=Float8LinearConfig.from_recipe_name("rowwise")
    )
