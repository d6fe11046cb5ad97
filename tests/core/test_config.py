from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt.core.config import (
    Auto,
    Config,
    field_help,
    from_mapping,
    load_config,
    resolved_values,
    to_yaml,
)
from minigpt.core.errors import ConfigError


class Optimizer(Config):
    lr: float | Auto = "auto"
    """Learning rate."""
    kind: Literal["adamw", "muon"] = "adamw"
    """Which update rule."""


class Recipe(Config):
    name: str
    """What the run is called."""
    steps: int = 10
    """Optimizer updates."""
    optimizer: Optimizer = Optimizer()
    """How weights are updated."""


def test_file_and_overrides_meet(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("name: a\noptimizer: {kind: muon}\n")
    recipe = load_config(Recipe, path, ["steps=20", "optimizer.lr=3e-4"])
    assert recipe == Recipe(name="a", steps=20, optimizer=Optimizer(lr=3e-4, kind="muon"))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["name=x", "stepz=3"], "unknown key 'stepz': did you mean 'steps'?"),
        (["name=x", "optimizer.lrr=3"], "unknown key 'optimizer.lrr': did you mean 'lr'?"),
        (["name=x", "optimizer.lr=high"], "optimizer.lr = 'high': must be a valid number"),
        (["name=x", "optimizer.kind=sgd"], "optimizer.kind = 'sgd': must be 'adamw' or 'muon'"),
        (["steps=3"], "name is required"),
        (["name=x", "steps=.nan"], "steps"),
        (["name"], "--set 'name' is not an assignment"),
        (["name=[1"], "not valid YAML"),
        (["name=x", "optimizer=3"], "optimizer = 3"),
    ],
)
def test_bad_values_are_one_line_that_names_them(overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(Recipe, None, overrides)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("- 1\n", "not a mapping"), ("a: [\n", "not valid YAML"), ("\xff", "unknown key|not a map")],
)
def test_bad_files_are_refused(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=expected):
        load_config(Recipe, path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such config file: .*nowhere\.yaml"):
        load_config(Recipe, tmp_path / "nowhere.yaml")


def test_configs_are_frozen_and_replace_validates() -> None:
    recipe = Recipe(name="a")
    with pytest.raises(ValueError, match="frozen"):
        recipe.steps = 3  # type: ignore[misc]
    assert recipe.replace(steps=5).steps == 5
    with pytest.raises(ConfigError, match="steps = 'many'"):
        recipe.replace(steps="many")


def test_resolved_values_lists_only_what_changed() -> None:
    before = Recipe(name="a")
    after = before.replace(optimizer=Optimizer(lr=0.1))
    assert resolved_values(before, after) == [("optimizer.lr", "auto", 0.1)]


def test_field_help_carries_every_description() -> None:
    rows = {key: (kind, default, text) for key, kind, default, text in field_help(Recipe)}
    assert rows["optimizer.lr"] == ("float | 'auto'", "'auto'", "Learning rate.")
    assert rows["name"][1] == "required"


@given(
    name=st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Zs"))),
    steps=st.integers(),
    lr=st.one_of(st.just("auto"), st.floats(allow_nan=False, allow_infinity=False)),
)
def test_yaml_round_trip(
    tmp_path_factory: pytest.TempPathFactory, name: str, steps: int, lr: float | str
) -> None:
    recipe = from_mapping(Recipe, {"name": name, "steps": steps, "optimizer": {"lr": lr}})
    path = tmp_path_factory.mktemp("yaml") / "recipe.yaml"
    path.write_text(to_yaml(recipe), encoding="utf-8")
    assert load_config(Recipe, path) == recipe
