"""Each recipe in the repository loads and resolves."""

from __future__ import annotations

from pathlib import Path

import pytest

from minigpt.core.config import load_config
from minigpt.train.config import TrainConfig
from minigpt.train.resolve import Facts, resolve

_ROOT = Path(__file__).parents[2]
_RECIPES = sorted((_ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", _RECIPES, ids=lambda path: path.stem)
def test_recipe_loads_and_resolves(path: Path) -> None:
    config = load_config(TrainConfig, path)
    assert config.name == path.stem
    facts = Facts(
        vocab_size=257,
        train_tokens=1_000_000,
        eos_token_id=256,
        bos_token_id=256,
        device="cpu",
        fast_bfloat16=True,
        compiler=True,
        threads=2,
        peak_flops=4e11,
    )
    assert resolve(config, facts).model.vocab_size == 257


def test_there_are_recipes() -> None:
    assert {"tiny", "pystdlib", "shakespeare"} <= {path.stem for path in _RECIPES}
