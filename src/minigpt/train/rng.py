"""The states of the global random generators, as tensors."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def capture_generators() -> dict[str, Tensor]:
    """Return copies of the states of torch's, numpy's and Python's global generators."""
    state = np.random.get_state(legacy=True)
    assert isinstance(state, tuple)
    _, keys, position, has_gauss, gauss = state
    version, words, python_gauss = random.getstate()
    tensors = {
        "torch_cpu": torch.get_rng_state(),
        "numpy_keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy_position": torch.tensor([position, has_gauss]),
        "numpy_gauss": torch.tensor(gauss, dtype=torch.float64),
        "python_words": torch.tensor([version, *words]),
        "python_gauss": torch.tensor(
            math.nan if python_gauss is None else python_gauss, dtype=torch.float64
        ),
    }
    if torch.cuda.is_available():
        tensors["torch_cuda"] = torch.cuda.get_rng_state()
    return tensors


def restore_generators(tensors: Mapping[str, Tensor]) -> None:
    """Set the generators to what `capture_generators` returned."""
    version, *words = tensors["python_words"].tolist()
    python_gauss = float(tensors["python_gauss"])
    random.setstate((version, tuple(words), None if math.isnan(python_gauss) else python_gauss))
    position, has_gauss = tensors["numpy_position"].tolist()
    keys = tensors["numpy_keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, float(tensors["numpy_gauss"])))
    torch.set_rng_state(tensors["torch_cpu"].clone())
    if torch.cuda.is_available() and "torch_cuda" in tensors:
        torch.cuda.set_rng_state(tensors["torch_cuda"].clone())
