from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from minigpt.compress.config import CompressConfig
from minigpt.compress.quantize import quantize
from minigpt.core.artifact import open_artifact
from minigpt.core.errors import ArtifactError, ModelError
from minigpt.model.attention import CausalAttention
from minigpt.model.linear import Int4Linear, Int8Embedding, Int8Linear, int8_linear
from minigpt.model.weights import load_model, save_model


def logits(path: Path) -> torch.Tensor:
    loaded = load_model(path, dtype="float32")
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        return loaded.model.logits(loaded.model(tokens, tokens, CausalAttention()))


def test_artifact_is_a_smaller_model_with_its_parent_and_tokenizer(
    tiny_model: Path, tmp_path: Path
) -> None:
    made = quantize(tiny_model, tmp_path / "int8")
    assert [parent.id for parent in made.manifest.parents] == [open_artifact(tiny_model).id]
    assert (made.path / "tokenizer.json").read_bytes() == (
        tiny_model / "tokenizer.json"
    ).read_bytes()
    sizes = [(path / "model.safetensors").stat().st_size for path in (tiny_model, made.path)]
    assert sizes[1] < 0.3 * sizes[0]
    linears = [
        module
        for module in load_model(made.path).model.modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding)
    ]
    assert linears == []
    before, after = logits(tiny_model), logits(made.path)
    error = (before - after).norm() / before.norm()
    assert 0 < error < 0.05


def test_weights_are_within_half_a_step(tiny_model: Path, tmp_path: Path) -> None:
    made = load_model(quantize(tiny_model, tmp_path / "int8").path)
    originals = dict(load_model(tiny_model).model.named_modules())
    checked = 0
    for name, module in made.model.named_modules():
        if isinstance(module, Int8Linear | Int8Embedding):
            original = originals[name].weight
            assert isinstance(original, torch.Tensor)
            scale = module.scale.float()[:, None]
            error = (module.weight.float() * scale - original).abs()
            # The scale is rounded to bfloat16, which may clip the largest by 1/256 of itself.
            assert (error <= scale * (0.5 + 127 / 256)).all()
            assert (error <= 0.5001 * scale).float().mean() > 0.95
            checked += 1
    assert checked == 2 * 7 + 2


def test_bare_directory_has_no_parent(tiny_model: Path, tmp_path: Path) -> None:
    loaded = load_model(tiny_model)
    save_model(tmp_path / "bare", loaded.model, loaded.config)
    made = quantize(tmp_path / "bare", tmp_path / "int8")
    assert made.manifest.parents == ()


def test_an_interrupted_command_goes_on_with_the_same_model_only(
    tiny_model: Path, tmp_path: Path
) -> None:
    made = quantize(tiny_model, tmp_path / "int8")
    assert quantize(tiny_model, tmp_path / "int8").id == made.id
    loaded = load_model(tiny_model)
    save_model(tmp_path / "other", loaded.model, loaded.config)
    with pytest.raises(ArtifactError, match="never changed"):
        quantize(tmp_path / "other", tmp_path / "int8")


def test_refusals_leave_nothing(tiny_model: Path, tmp_path: Path) -> None:
    made = quantize(tiny_model, tmp_path / "int8")
    with pytest.raises(ModelError, match="int8 already"):
        quantize(made.path, tmp_path / "twice")
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        quantize(tmp_path / "nowhere", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["int8"]


def test_int8_products_are_right_and_alive_at_any_alignment_and_width() -> None:
    """Torch's packed kernel crashes on weights that do not begin at a multiple of 16 bytes."""
    generator = torch.Generator().manual_seed(0)
    for rows, width, offset in [(1, 64, 4), (5, 64, 36), (5, 72, 0), (8, 100, 1), (4, 64, 0)]:
        stored = torch.randint(-127, 128, (57 * width + 64,), dtype=torch.int8, generator=generator)
        weight = stored[offset : offset + 57 * width].view(57, width)
        scale = (torch.rand(57, generator=generator) / 100).bfloat16()
        inputs = torch.randn(rows, width, generator=generator).bfloat16()
        expected = (inputs.float() @ weight.float().T) * scale.float()
        error = (int8_linear(inputs, weight, scale, None).float() - expected).abs().max()
        assert error < 0.02 * expected.abs().max(), (rows, width, offset)


def test_loaded_int8_weights_are_aligned_for_the_packed_kernel(
    tiny_model: Path, tmp_path: Path
) -> None:
    made = quantize(tiny_model, tmp_path / "int8")
    tensors = load_model(made.path, dtype="bfloat16").model.state_dict()
    weights = [tensor for tensor in tensors.values() if tensor.dtype == torch.int8]
    assert weights and all(weight.data_ptr() % 16 == 0 for weight in weights)


def test_int4_is_smaller_and_errs_more(tiny_model: Path, tmp_path: Path) -> None:
    eight = quantize(tiny_model, tmp_path / "int8")
    sizes, errors = {}, {}
    before = logits(tiny_model)
    for group_size in (32, 64):
        config = CompressConfig(method="int4", group_size=group_size)
        made = quantize(tiny_model, tmp_path / f"int4-{group_size}", config)
        assert made.manifest.config["compress"]["group_size"] == group_size
        tree = json.loads((made.path / "config.json").read_text())["quantization_config"]
        assert (tree["bits"], tree["group_size"]) == (4, group_size)
        model = load_model(made.path).model
        assert isinstance(model.lm_head, Int8Linear)
        layers = [module for module in model.modules() if isinstance(module, Int4Linear)]
        assert len(layers) == 2 * 7 and {layer.group_size for layer in layers} == {group_size}
        sizes[group_size] = sum(t.nbytes for t in model.state_dict().values())
        errors[group_size] = float((logits(made.path) - before).norm() / before.norm())
    int8 = sum(t.nbytes for t in load_model(eight.path).model.state_dict().values())
    assert sizes[64] < sizes[32] < int8
    error8 = float((logits(eight.path) - before).norm() / before.norm())
    assert error8 < errors[32] < errors[64] < 0.4


def test_an_int4_artifact_is_the_same_twice_and_goes_on_by_its_method(
    tiny_model: Path, tmp_path: Path
) -> None:
    config = CompressConfig(method="int4")
    made = quantize(tiny_model, tmp_path / "a", config)
    assert made.manifest.config["compress"]["group_size"] == 32
    assert quantize(tiny_model, tmp_path / "a", config).id == made.id
    again = quantize(tiny_model, tmp_path / "b", config)
    first, second = (load_model(each.path).model.state_dict() for each in (made, again))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    for other in (CompressConfig(), config.replace(group_size=64)):
        with pytest.raises(ArtifactError, match="never changed"):
            quantize(tiny_model, tmp_path / "a", other)
    with pytest.raises(ModelError, match="int4 already"):
        quantize(made.path, tmp_path / "twice")


def test_groups_that_no_layer_has_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    from minigpt.core.config import from_mapping
    from minigpt.core.errors import ConfigError
    from minigpt.model.config import ModelConfig
    from minigpt.model.decoder import Decoder

    with pytest.raises(ConfigError, match="group_size = 64 with method = int8"):
        from_mapping(CompressConfig, {"group_size": 64})
    config = ModelConfig(
        vocab_size=40, num_layers=1, hidden_size=48, num_heads=3, num_kv_heads=3, head_dim=16,
        intermediate_size=80, context_length=32,
    )  # fmt: skip
    model = Decoder(config)
    model.init_weights(torch.Generator().manual_seed(0))
    save_model(tmp_path / "odd", model, config)
    with pytest.raises(ModelError, match="no layer's inputs are whole groups of 64"):
        quantize(tmp_path / "odd", tmp_path / "out", CompressConfig(method="int4", group_size=64))
    assert not (tmp_path / "out").exists()
