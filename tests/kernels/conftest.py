"""Every level of kernels that this machine runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from minigpt.kernels import library

_FOUND = library.loaded()


@pytest.fixture(params=_FOUND.levels if _FOUND else ())
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once with the kernels of each level that runs here."""
    assert _FOUND is not None
    before = _FOUND.level
    _FOUND.use_level(request.param)
    yield request.param
    _FOUND.use_level(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """Let the test set torch's number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
