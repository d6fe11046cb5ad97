"""`minigpt models merge-adapter`: an adapter and its base become one plain model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from minigpt.cli.main import run
from minigpt.core.artifact import Artifact, create_artifact, lineage, open_artifact
from minigpt.model.attention import CausalAttention
from minigpt.model.config import LoraConfig
from minigpt.model.lora import add_adapters, save_adapter
from minigpt.model.weights import load_model, save_model

LORA = LoraConfig(rank=4, targets=("q_proj", "up_proj"))


@pytest.fixture
def adapter(tiny_model: Path, tmp_path: Path) -> tuple[Artifact, torch.Tensor]:
    """An adapter of the tiny model, and the logits that it gives."""
    model = load_model(tiny_model).model
    generator = torch.Generator().manual_seed(0)
    add_adapters(model, LORA, generator)
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0.0, 0.3, generator=generator)
        logits = model.logits(model(tokens, tokens, CausalAttention()))
    parents = [open_artifact(tiny_model)]
    with create_artifact(tmp_path / "adapter", kind="adapter", parents=parents) as draft:
        save_adapter(draft.path, model, LORA, str(tiny_model))
    assert draft.artifact is not None
    return draft.artifact, logits


def test_the_merged_model_gives_the_adapters_logits(
    adapter: tuple[Artifact, torch.Tensor],
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made, expected = adapter
    out = tmp_path / "merged"
    assert (
        run(["models", "merge-adapter", str(tiny_model), str(made.path), str(out), "--json"]) == 0
    )
    result = json.loads(capsys.readouterr().out)
    merged = open_artifact(out, kind="model")
    assert result == {"uri": str(out), "id": merged.id, "rank": 4}
    assert [node.artifact is not None for node in lineage(merged).ancestors] == [True, True]
    assert (out / "tokenizer.json").is_file()
    model = load_model(out).model
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        found = model.logits(model(tokens, tokens, CausalAttention()))
        base = load_model(tiny_model).model
        plain = base.logits(base(tokens, tokens, CausalAttention()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert float((found - plain).abs().max()) > 0.5


def test_a_bare_peft_directory_serves_too(
    adapter: tuple[Artifact, torch.Tensor], tiny_model: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(adapter[0].path, bare)
    (bare / "manifest.json").unlink()
    out = tmp_path / "merged"
    assert run(["models", "merge-adapter", str(tiny_model), str(bare), str(out)]) == 0
    assert [parent.kind for parent in open_artifact(out).manifest.parents] == ["model"]


def test_another_base_or_no_adapter_is_one_line_and_leaves_nothing(
    adapter: tuple[Artifact, torch.Tensor],
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    loaded = load_model(tiny_model)
    with create_artifact(tmp_path / "other", kind="model") as draft:
        save_model(draft.path, loaded.model, loaded.config, loaded.path)
    out = tmp_path / "merged"
    for base, source, message in (
        (tmp_path / "other", adapter[0].path, "was trained on"),
        (tiny_model, tiny_model, "a model artifact, but a adapter is needed"),
        (tiny_model, tmp_path / "nowhere", "no adapter at"),
    ):
        assert run(["models", "merge-adapter", str(base), str(source), str(out)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
        assert not out.exists()
