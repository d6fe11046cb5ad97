from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minigpt.core.artifact import create_artifact, is_artifact, open_artifact
from minigpt.core.errors import ArtifactError, ModelError, StorageError
from minigpt.model.attention import CausalAttention
from minigpt.model.config import ModelConfig
from minigpt.model.decoder import Decoder
from minigpt.model.hf import quantization
from minigpt.model.linear import Int4Linear, Int8Embedding, Int8Linear, quantize_module
from minigpt.model.weights import check_vocab, load_model, save_model

WEIGHTS = "model.safetensors"


@pytest.fixture
def llama(hf_directory: Callable[[str], Path], tmp_path: Path) -> Path:
    """A bare directory of its own for each test to damage."""
    return Path(shutil.copytree(hf_directory("llama3"), tmp_path / "llama"))


def rewrite(directory: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add or (None) drop tensors; `.` in names is written `__`."""
    tensors = load_file(directory / WEIGHTS)
    for key, tensor in changes.items():
        name = key.replace("__", ".")
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def refusal(directory: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_directory_without_weights_is_refused(llama: Path) -> None:
    (llama / WEIGHTS).unlink()
    assert f"{llama} holds no weights" in refusal(llama)


def test_a_directory_without_config_is_refused(tmp_path: Path) -> None:
    assert "config.json is missing" in refusal(tmp_path)
    assert "config.json is missing" in refusal(tmp_path / "nowhere")


def test_malformed_config_is_refused(llama: Path) -> None:
    (llama / "config.json").write_text("{")
    assert "config.json" in refusal(llama)
    (llama / "config.json").write_text("[]")
    assert "not an object" in refusal(llama)


def test_pickled_weights_are_refused_with_the_remedy(llama: Path) -> None:
    (llama / WEIGHTS).unlink()
    torch.save({}, llama / "pytorch_model.bin")
    message = refusal(llama)
    assert "pytorch_model.bin is a pickle" in message
    assert "save_pretrained" in message


def test_missing_and_unexpected_and_misshapen_tensors_are_named(llama: Path) -> None:
    norm = load_file(llama / WEIGHTS)["model.norm.weight"]
    rewrite(llama, model__norm__weight=None)
    assert "model.norm.weight is missing" in refusal(llama)
    rewrite(llama, model__norm__weight=norm, model__norm__bias=norm.clone())
    assert "model.norm.bias is unexpected" in refusal(llama)
    rewrite(llama, model__norm__bias=None, model__norm__weight=norm[:5].clone())
    assert "model.norm.weight has shape (5,), but config.json makes it (64,)" in refusal(llama)
    rewrite(llama, model__norm__weight=norm, lm_head__weight=None)
    assert "lm_head.weight is missing" in refusal(llama)


def test_an_output_projection_that_contradicts_the_tie_is_refused(
    hf_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(hf_directory("qwen3"), tmp_path / "tied"))
    embedding = load_file(directory / WEIGHTS)["model.embed_tokens.weight"]
    rewrite(directory, lm_head__weight=embedding.clone())
    assert load_model(directory).model.lm_head is None
    rewrite(directory, lm_head__weight=embedding + 1)
    assert "tie_word_embeddings" in refusal(directory)


def test_truncated_weights_are_refused_by_name(llama: Path) -> None:
    data = (llama / WEIGHTS).read_bytes()
    (llama / WEIGHTS).write_bytes(data[:-100])
    assert str(llama / WEIGHTS) in refusal(llama)


def test_a_missing_shard_is_named(llama: Path, tmp_path: Path) -> None:
    loaded = load_model(llama)
    save_model(tmp_path / "sharded", loaded.model, loaded.config, max_shard_bytes=50_000)
    shards = sorted((tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 2
    assert all(file.stat().st_size < 60_000 for file in shards)
    assert load_model(tmp_path / "sharded").config == loaded.config
    shards[1].unlink()
    assert shards[1].name in refusal(tmp_path / "sharded")
    (tmp_path / "sharded" / "model.safetensors.index.json").write_text("{}")
    assert "not a valid safetensors index" in refusal(tmp_path / "sharded")


def test_older_files_load(hf_directory: Callable[[str], Path], tmp_path: Path) -> None:
    """GPT-2 as published: no prefix, causal masks among the weights. Llama's trunk alone."""
    gpt2 = Path(shutil.copytree(hf_directory("gpt2"), tmp_path / "gpt2"))
    expected = load_model(gpt2).model.state_dict()
    tensors = {
        name.removeprefix("transformer."): tensor
        for name, tensor in load_file(gpt2 / WEIGHTS).items()
    }
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 128, 128)
    tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, gpt2 / WEIGHTS)
    found = load_model(gpt2).model.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)

    qwen = Path(shutil.copytree(hf_directory("qwen3"), tmp_path / "qwen"))
    trunk = {k.removeprefix("model."): v for k, v in load_file(qwen / WEIGHTS).items()}
    save_file(trunk | {"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}, qwen / WEIGHTS)
    assert load_model(qwen).model.lm_head is None


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_are_kept_unless_one_is_asked_for(
    llama: Path, tmp_path: Path, stored: torch.dtype
) -> None:
    loaded = load_model(llama)
    save_model(tmp_path / "cast", loaded.model.to(stored), loaded.config)
    tree = json.loads((tmp_path / "cast" / "config.json").read_bytes())
    assert tree["torch_dtype"] == str(stored).removeprefix("torch.")
    kept = load_model(tmp_path / "cast").model
    assert {p.dtype for p in kept.parameters()} == {stored}
    cast = load_model(tmp_path / "cast", dtype="bfloat16").model
    assert {p.dtype for p in cast.parameters()} == {torch.bfloat16}
    rotary = cast.model.rotary
    assert rotary is not None
    assert rotary.inverse_frequencies.dtype == torch.float32
    with pytest.raises(ModelError, match="dtype 'int4' is unknown"):
        load_model(tmp_path / "cast", dtype="int4")


def test_training_on_loaded_weights_does_not_touch_the_file(llama: Path) -> None:
    before = (llama / WEIGHTS).read_bytes()
    model = load_model(llama).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert (llama / WEIGHTS).read_bytes() == before


def test_an_artifact_is_verified_and_its_id_is_the_models(tiny_model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_model, tmp_path / "copy"))
    loaded = load_model(copy)
    assert loaded.id == open_artifact(copy).id
    assert not loaded.model.training
    with (copy / WEIGHTS).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    with pytest.raises(ArtifactError, match=r"model\.safetensors is corrupt"):
        load_model(copy)
    load_model(copy, verify=False)


def test_another_kind_of_artifact_is_refused(tmp_path: Path) -> None:
    with create_artifact(tmp_path / "report", kind="report") as draft:
        (draft.path / "report.json").write_text("{}")
    with pytest.raises(ArtifactError, match="is a report artifact, but a model is needed"):
        load_model(tmp_path / "report")


def test_a_bare_directorys_id_follows_its_content(llama: Path, tmp_path: Path) -> None:
    assert not is_artifact(llama)
    first = load_model(llama).id
    twin = Path(shutil.copytree(llama, tmp_path / "twin"))
    assert load_model(twin).id == first
    rewrite(twin, model__norm__weight=torch.ones(64))
    assert load_model(twin).id != first


def test_ends_of_text_of_generation_config_are_added(llama: Path) -> None:
    tree = {"eos_token_id": [2, 77, 78]}
    (llama / "generation_config.json").write_text(json.dumps(tree))
    config = load_model(llama).config
    assert (config.eos_token_id, config.stop_token_ids) == (2, (77, 78))


def test_a_configuration_of_no_family_survives(tmp_path: Path) -> None:
    config = ModelConfig(
        vocab_size=40,
        num_layers=2,
        hidden_size=24,
        num_heads=3,
        num_kv_heads=1,
        head_dim=8,
        intermediate_size=32,
        context_length=16,
        norm="layernorm",
        mlp="gelu",
    )
    model = Decoder(config)
    model.init_weights(torch.Generator().manual_seed(0))
    save_model(tmp_path / "own", model, config)
    loaded = load_model(tmp_path / "own")
    assert loaded.config == config
    found = loaded.model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("group_size", [None, 32])
def test_quantized_models_load_like_any_other(
    family: str,
    dtype: str,
    group_size: int | None,
    hf_directory: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    original = load_model(hf_directory(family), dtype=dtype)
    quantize_module(original.model, group_size)
    save_model(tmp_path / "small", original.model, original.config)
    loaded = load_model(tmp_path / "small")
    kinds = [type(module) for module in loaded.model.modules()]
    assert torch.nn.Linear not in kinds
    assert (Int8Linear if group_size is None else Int4Linear) in kinds
    assert Int8Embedding in kinds
    assert loaded.config == original.config
    found = loaded.model.state_dict()
    for name, tensor in original.model.state_dict().items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    tree = json.loads((tmp_path / "small" / "config.json").read_text())
    assert quantization(tree) == ("int8" if group_size is None else "int4")
    assert tree["quantization_config"].get("group_size") == group_size

    tokens, positions = torch.arange(20)[None], torch.arange(20)[None]
    attention = CausalAttention(sliding_window=loaded.config.sliding_window)
    hidden = loaded.model(tokens, positions, attention)
    assert torch.equal(hidden, original.model(tokens, positions, attention))
    assert loaded.model.logits(hidden).dtype == hidden.dtype
    assert loaded.model.output_weight.shape == (160, 64)


def test_a_state_that_is_not_the_configurations_is_not_written(
    tiny_model: Path, tmp_path: Path
) -> None:
    loaded = load_model(tiny_model)
    state = loaded.model.state_dict()
    del state["lm_head.weight"]
    with pytest.raises(ModelError, match=r"lm_head\.weight is missing"):
        save_model(tmp_path / "bad", state, loaded.config)
    assert not (tmp_path / "bad").exists()


def test_the_tokenizer_travels_with_the_model(tiny_model: Path, tmp_path: Path) -> None:
    loaded = load_model(tiny_model)
    save_model(tmp_path / "copy", loaded.model, loaded.config, tokenizer_dir=tiny_model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (tiny_model / name).read_bytes()
    with pytest.raises(ModelError, match="no tokenizer at"):
        save_model(tmp_path / "none", loaded.model, loaded.config, tokenizer_dir=tmp_path)


def test_a_full_disk_leaves_nothing(tiny_model: Path, tmp_path: Path) -> None:
    loaded = load_model(tiny_model)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 15, hard))
    try:
        with (
            pytest.raises(StorageError, match=r"model\.safetensors"),
            create_artifact(tmp_path / "model", kind="model") as draft,
        ):
            save_model(draft.path, loaded.model, loaded.config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("rows", "tokens", "fits"),
    [
        (50_257, 50_257, True),
        (151_936, 151_669, True),  # Qwen pads
        (384, 257, True),
        (256, 257, False),
        (50_257, 257, False),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(rows: int, tokens: int, fits: bool) -> None:
    config = ModelConfig(
        vocab_size=rows,
        num_layers=1,
        hidden_size=8,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        intermediate_size=8,
        context_length=8,
    )
    if fits:
        check_vocab(config, tokens)
        return
    with pytest.raises(ModelError) as caught:
        check_vocab(config, tokens)
    assert str(rows) in str(caught.value)
    assert str(tokens) in str(caught.value)


def test_loading_needs_neither_data_nor_compress_nor_transformers(tiny_model: Path) -> None:
    code = (
        "import sys; from minigpt.model.weights import load_model; load_model(sys.argv[1]); "
        "print([m for m in sys.modules if m.startswith(('minigpt.data', 'minigpt.compress', "
        "'transformers'))])"
    )
    command = [sys.executable, "-c", code, str(tiny_model)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
