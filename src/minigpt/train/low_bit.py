"""AdamW whose moments are bytes, quantized in blocks of 256, by torchao.

See https://arxiv.org/abs/2110.02861. Tensors of fewer than 4,096 elements, or of a number that
is no multiple of 256, keep float32 moments. torchao compiles the update, once for each shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from minigpt.core.errors import ConfigError
from minigpt.train.config import TrainConfig

_STORED = ("codes", "scale")  # the third part, a table from bytes to numbers, never changes


def make_adamw8bit(groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    """Return torchao's AdamW over parameter groups.

    Raises:
        ConfigError: torchao is not installed.
    """
    try:
        from torchao.optim import AdamW8bit
    except ImportError:
        raise ConfigError(
            "optimizer.state_bits = 8 needs torchao", remedy='pip install "minigpt[lowbit]"'
        ) from None
    optimizer: torch.optim.Optimizer = AdamW8bit(groups, **options)
    return optimizer


def check_state_bits(config: TrainConfig, has_compiler: bool) -> None:
    """Refuse 8-bit moments where they can't work.

    Raises:
        ConfigError: No compiler is here, or parameters are sharded.
    """
    if config.optimizer.state_bits == 32:
        return
    if not has_compiler:
        raise ConfigError(
            "optimizer.state_bits = 8 needs torch.compile, and no C++ compiler (on a GPU: triton) "
            "is here",
            remedy="install one, or --set optimizer.state_bits=32",
        )
    for axis in ("fsdp", "ep", "tp"):
        size = getattr(config.mesh, axis)
        if size > 1:
            raise ConfigError(
                f"optimizer.state_bits = 8 with mesh.{axis} = {size}: blocks of 256 elements end "
                "with a shard, so that a checkpoint could not be loaded onto another mesh",
                remedy="--set optimizer.state_bits=32, which shards too",
            )


def stored_parts(key: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the plain tensors of an optimizer state, which a checkpoint can hold."""
    if all(hasattr(value, part) for part in _STORED):
        for part in _STORED:
            yield f"{key}.{part}", getattr(value, part)
    else:
        yield key, value


def restore_part(
    optimizer: torch.optim.Optimizer, parameter: Tensor, key: str, value: Tensor
) -> None:
    """Put a tensor of `stored_parts` into an optimizer's state of a parameter."""
    state = optimizer.state[parameter]
    name, _, part = key.partition(".")
    if not part:
        # Cloned, not viewed: the alignment of a mapped file would change the bits.
        state[name] = value.to(parameter.device, copy=True)
        return
    if name not in state:
        state[name] = optimizer._new_buffer(parameter, name == "exp_avg")  # type: ignore[attr-defined]
    getattr(state[name], part).copy_(value)
