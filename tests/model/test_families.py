"""The decoder against transformers, family by family, and the round trip through files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minigpt.model.attention import CausalAttention
from minigpt.model.hf import config_from_hf
from minigpt.model.hf_write import config_to_hf
from minigpt.model.moe import Experts
from minigpt.model.weights import LoadedModel, load_model, save_model

TOLERANCE = 1e-5
TOKENS = torch.randint(0, 160, (2, 40), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits_of(loaded: LoadedModel) -> torch.Tensor:
    attention = CausalAttention(sliding_window=loaded.config.sliding_window)
    positions = torch.arange(TOKENS.shape[1]).expand_as(TOKENS)
    return loaded.model.logits(loaded.model(TOKENS, positions, attention))


@torch.no_grad()
def test_logits_are_those_of_transformers(
    family: str, reference: Callable[[str], Any], hf_directory: Callable[[str], Path]
) -> None:
    expected = reference(family)(TOKENS).logits
    found = logits_of(load_model(hf_directory(family)))
    assert expected.std() > 0.3
    assert (found - expected).abs().max() <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", ["GPT2", "Llama", "Mistral", "Qwen2", "Qwen3"])
def test_logits_agree_on_random_configurations(
    kind: str, seed: int, random_reference: Callable[[str, int], Any], tmp_path: Path
) -> None:
    theirs = random_reference(kind, seed)
    theirs.save_pretrained(tmp_path)
    difference = theirs(TOKENS).logits - logits_of(load_model(tmp_path))
    assert difference.abs().max() <= TOLERANCE


@torch.no_grad()
def test_transformers_loads_what_we_save(
    family: str, hf_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    import transformers

    loaded = load_model(hf_directory(family))
    save_model(tmp_path, loaded.model, loaded.config)
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    theirs, report = load(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert (theirs(TOKENS).logits - logits_of(loaded)).abs().max() <= TOLERANCE


def test_export_import_export_keeps_every_byte(
    family: str, hf_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    original = load_model(hf_directory(family))
    save_model(first, original.model, original.config)
    again = load_model(first)
    assert again.config == original.config
    save_model(second, again.model, again.config, max_shard_bytes=30_000)
    save_model(first / "again", again.model, again.config)

    weights = "model.safetensors"
    assert (first / weights).read_bytes() == (first / "again" / weights).read_bytes()
    stored = load_file(hf_directory(family) / weights)
    shards: dict[str, torch.Tensor] = {}
    for file in second.glob("*.safetensors"):
        shards |= load_file(file)
    for exported in (load_file(first / weights), shards):
        assert exported.keys() == stored.keys()
        assert all(torch.equal(exported[name], stored[name]) for name in stored)


def test_config_survives_both_ways(family: str, hf_directory: Callable[[str], Path]) -> None:
    tree = json.loads((hf_directory(family) / "config.json").read_bytes())
    config = config_from_hf(tree)
    written = config_to_hf(config)
    assert config_from_hf(json.loads(json.dumps(written))) == config
    if family != "mistral-no-window":  # the same computation as Llama's, and written as one
        assert written["model_type"] == tree["model_type"]


def test_parameter_count_is_the_models(family: str, hf_directory: Callable[[str], Path]) -> None:
    loaded = load_model(hf_directory(family))
    counts = loaded.config.parameter_counts()
    assert counts.total == sum(p.numel() for p in loaded.model.parameters())
    matrices = (p for name, p in loaded.model.named_parameters() if p.dim() == 2)
    looked_up = counts.embedding - loaded.config.tie_embeddings * loaded.model.output_weight.numel()
    experts = [m for m in loaded.model.modules() if isinstance(m, Experts)]
    idle = loaded.config.num_experts - loaded.config.experts_per_token
    unused = sum(idle * sum(p.numel() for p in layer["0"].parameters()) for layer in experts)
    assert counts.matmul == sum(p.numel() for p in matrices) - looked_up - unused
