"""The machine's limits are measured, and possible."""

from __future__ import annotations

import pytest
import torch

from minigpt.kernels import library
from minigpt.kernels.roofline import Arithmetic, peak, read_bandwidth


@pytest.mark.usefixtures("level")
def test_limits_are_of_this_world() -> None:
    kernels = library.loaded()
    assert kernels is not None
    assert 1e7 < read_bandwidth(kernels, span=16 << 20, repeat=1) < 1e13
    for arithmetic in Arithmetic:
        assert 1e7 < peak(kernels, arithmetic, repeat=2) < 1e14


@pytest.mark.usefixtures("threads")
def test_operations_are_of_all_threads() -> None:
    kernels = library.loaded()
    if kernels is None:
        pytest.skip("no kernels here")
    done = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        done.append(kernels.functions.mg_peak(Arithmetic.FLOAT32, 100))
    assert done[1] == 2 * done[0] > 0
