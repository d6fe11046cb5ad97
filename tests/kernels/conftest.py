"""Every level of kernels that this machine runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from minigpt.kernels import library


@pytest.fixture(params=library.LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once with the kernels of each level."""
    kernels = library.loaded()
    if kernels is None or request.param not in kernels.levels:
        pytest.skip(f"level {request.param} does not run here")
    before = kernels.level
    kernels.use_level(request.param)
    yield request.param
    kernels.use_level(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """Let the test set torch's number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
