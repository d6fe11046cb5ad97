from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from minigpt.core.config import from_mapping
from minigpt.core.errors import ConfigError, ModelError
from minigpt.model.attention import CausalAttention
from minigpt.model.config import LoraConfig, ModelConfig
from minigpt.model.decoder import Decoder
from minigpt.model.linear import quantize_module
from minigpt.model.lora import (
    LoraLinear,
    adapters_off,
    add_adapters,
    load_adapter,
    merged_state,
    save_adapter,
    trained_state,
)
from minigpt.model.weights import load_model

LORA = LoraConfig(rank=4, alpha=8.0)


def build(**changes: Any) -> Decoder:
    fields = {
        "vocab_size": 97,
        "num_layers": 2,
        "hidden_size": 32,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "context_length": 32,
        "qkv_bias": True,
    }
    model = Decoder(from_mapping(ModelConfig, fields | changes))
    model.init_weights(torch.Generator().manual_seed(1))
    return model


def adapted(config: LoraConfig = LORA, **changes: Any) -> Decoder:
    """Return a decoder whose adapters do something."""
    model = build(**changes)
    generator = torch.Generator().manual_seed(2)
    add_adapters(model, config, generator)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoraLinear):
                module.lora_B.weight.normal_(0.0, 0.2, generator=generator)
    return model


def logits(model: Decoder) -> Tensor:
    tokens = torch.randint(0, 97, (2, 16), generator=torch.Generator().manual_seed(3))
    positions = torch.arange(16).expand(2, 16)
    with torch.no_grad():
        return model.logits(model(tokens, positions, CausalAttention()))


def test_a_fresh_adapter_changes_nothing_and_alone_can_learn() -> None:
    base, model = build(), build()
    add_adapters(model, LORA, torch.Generator().manual_seed(0))
    assert torch.equal(logits(model), logits(base))
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == set(trained_state(model))
    assert len(learning) == 2 * 2 * 7
    assert all(".lora_A." in name or ".lora_B." in name for name in learning)
    assert set(base.state_dict()) == set(model.state_dict()) - learning


def test_merged_logits_equal_those_of_the_adapter() -> None:
    model = adapted()
    merged = build()
    merged.load_state_dict(merged_state(model))
    assert not torch.allclose(logits(model), logits(build()), atol=0.1)
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-5, atol=1e-5)


def test_a_bfloat16_base_is_merged_in_float32() -> None:
    model = adapted()
    module = model.get_submodule("model.layers.1.mlp.down_proj")
    assert isinstance(module, LoraLinear)
    exact = module.weight + 2.0 * (module.lora_B.weight @ module.lora_A.weight)
    half = module.weight.detach().bfloat16()
    module.weight = nn.Parameter(half, requires_grad=False)
    wide = half.float() + 2.0 * (module.lora_B.weight @ module.lora_A.weight)
    assert torch.equal(module.merged_weight(), wide.bfloat16())
    assert float((module.merged_weight() - exact).detach().abs().max()) < 0.02


def test_adapters_off_is_the_base_and_comes_back_on_after_an_error() -> None:
    model = adapted()
    before = logits(model)
    with pytest.raises(RuntimeError, match="within"), adapters_off(model):
        assert torch.equal(logits(model), logits(build()))
        raise RuntimeError("within")
    assert torch.equal(logits(model), before)


def test_dropout_is_for_training_alone() -> None:
    model = adapted(LoraConfig(rank=4, alpha=8.0, dropout=0.5))
    plain = adapted()
    assert torch.equal(logits(model.eval()), logits(plain))
    assert not torch.allclose(logits(model.train()), logits(plain), atol=1e-3)


def test_the_gradient_is_that_of_the_merged_weights() -> None:
    """dL/dA = s B^T dL/dW and dL/dB = s dL/dW A^T, in float64 to 1e-10."""
    model = adapted().double()
    merged = build().double()
    merged.load_state_dict({k: v.double() for k, v in merged_state(model).items()})
    tokens = torch.randint(0, 97, (2, 16), generator=torch.Generator().manual_seed(3))
    positions = torch.arange(16).expand(2, 16)
    for each in (model, merged):
        hidden = each(tokens, positions, CausalAttention())
        each.logits(hidden).square().mean().backward()  # type: ignore[no-untyped-call]
    weights = dict(merged.named_parameters())
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            whole = weights[f"{name}.weight"].grad
            assert whole is not None and module.weight.grad is None
            pairs = (
                (module.lora_A.weight.grad, 2.0 * module.lora_B.weight.T @ whole),
                (module.lora_B.weight.grad, 2.0 * whole @ module.lora_A.weight.T),
            )
            for found, expected in pairs:
                assert found is not None
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_files_are_pefts_and_come_back(tmp_path: Path) -> None:
    model = adapted(LoraConfig(rank=4, alpha=8.0, targets=("q_proj", "down_proj")))
    config = LoraConfig(rank=4, alpha=8.0, targets=("down_proj", "q_proj"))
    save_adapter(tmp_path, model, config, "runs/base/model")
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in names
    assert len(names) == 2 * 2 * 2
    tree = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (tree["peft_type"], tree["r"], tree["lora_alpha"]) == ("LORA", 4, 8.0)
    assert tree["target_modules"] == ["down_proj", "q_proj"]
    read = load_adapter(tmp_path)
    assert read.config == config and read.base == "runs/base/model"
    fresh = build()
    read.apply(fresh)
    assert torch.equal(logits(fresh), logits(model))


def test_what_plain_lora_can_not_do_is_refused_by_name(tmp_path: Path) -> None:
    save_adapter(tmp_path, adapted(), LORA, "base")
    good = json.loads((tmp_path / "adapter_config.json").read_text())
    for change, message in (
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"peft_type": "IA3"}, "peft_type = 'IA3'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["q_proj", "lm_head"]}, r"\['lm_head'\] are not supported"),
        ({"target_modules": "all-linear"}, r"\['all-linear'\] are not supported"),
        ({"r": "many"}, "rank = 'many'"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(good | change))
        with pytest.raises(ModelError, match=message):
            load_adapter(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(ModelError, match="no adapter at"):
        load_adapter(tmp_path)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    save_adapter(tmp_path, adapted(), LORA, "base")
    read = load_adapter(tmp_path)
    with pytest.raises(ModelError, match="is in one alone"):
        read.apply(build(num_layers=1))
    with pytest.raises(ModelError, match=r"\(48, 4\) there and \(64, 4\) here"):
        read.apply(build(intermediate_size=64))


def test_models_without_the_target_are_refused() -> None:
    gelu = build(mlp="gelu")
    with pytest.raises(ModelError, match="has no gate_proj"):
        add_adapters(gelu, LORA, torch.Generator())
    quantized = build()
    quantize_module(quantized)
    with pytest.raises(ModelError, match="q_proj is a Int8Linear"):
        add_adapters(quantized, LORA, torch.Generator())
    with pytest.raises(ConfigError, match="name each projection once"):
        from_mapping(LoraConfig, {"targets": ["q_proj", "q_proj"]})


def test_peft_reads_the_files(tiny_model: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = load_model(tiny_model).model
    add_adapters(model, LORA, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0.0, 0.1)
    save_adapter(tmp_path, model, LORA, str(tiny_model))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path)
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        expected = theirs(tokens).logits
        found = model.logits(model(tokens, tokens, CausalAttention()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
