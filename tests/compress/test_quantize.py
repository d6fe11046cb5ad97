from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minigpt.compress.quantize import quantize_int8
from minigpt.core.artifact import open_artifact
from minigpt.core.errors import ArtifactError, ModelError
from minigpt.model.attention import CausalAttention
from minigpt.model.linear import Int8Embedding, Int8Linear, int8_linear
from minigpt.model.weights import load_model, save_model


def logits(path: Path) -> torch.Tensor:
    loaded = load_model(path, dtype="float32")
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        return loaded.model.logits(loaded.model(tokens, tokens, CausalAttention()))


def test_artifact_is_a_smaller_model_with_its_parent_and_tokenizer(
    tiny_model: Path, tmp_path: Path
) -> None:
    made = quantize_int8(tiny_model, tmp_path / "int8")
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
    made = load_model(quantize_int8(tiny_model, tmp_path / "int8").path)
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
    made = quantize_int8(tmp_path / "bare", tmp_path / "int8")
    assert made.manifest.parents == ()


def test_an_interrupted_command_goes_on_with_the_same_model_only(
    tiny_model: Path, tmp_path: Path
) -> None:
    made = quantize_int8(tiny_model, tmp_path / "int8")
    assert quantize_int8(tiny_model, tmp_path / "int8").id == made.id
    loaded = load_model(tiny_model)
    save_model(tmp_path / "other", loaded.model, loaded.config)
    with pytest.raises(ArtifactError, match="never changed"):
        quantize_int8(tmp_path / "other", tmp_path / "int8")


def test_refusals_leave_nothing(tiny_model: Path, tmp_path: Path) -> None:
    made = quantize_int8(tiny_model, tmp_path / "int8")
    with pytest.raises(ModelError, match="int8 already"):
        quantize_int8(made.path, tmp_path / "twice")
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        quantize_int8(tmp_path / "nowhere", tmp_path / "out")
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
    made = quantize_int8(tiny_model, tmp_path / "int8")
    tensors = load_model(made.path, dtype="bfloat16").model.state_dict()
    weights = [tensor for tensor in tensors.values() if tensor.dtype == torch.int8]
    assert weights and all(weight.data_ptr() % 16 == 0 for weight in weights)
