"""Each axis and each pair of dp, fsdp and tp against one process, in real processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel
from typer.testing import CliRunner

from minigpt.cli.verify_parallel import app
from minigpt.core.config import from_mapping
from minigpt.model.config import ModelConfig
from minigpt.train import verify_parallel as module
from minigpt.train.config import MeshConfig, TrainConfig
from minigpt.train.parallelize import spread
from minigpt.train.processes import Ranks
from minigpt.train.verify_parallel import Verdict, family, verify_parallel

QWEN3: dict[str, Any] = {"num_kv_heads": 2, "num_heads": 4}
GPT2: dict[str, Any] = {
    "norm": "layernorm",
    "position": "learned",
    "mlp": "gelu",
    "qk_norm": False,
    "qkv_bias": True,
    "output_bias": True,
    "mlp_bias": True,
}
UNTIED: dict[str, Any] = {"tie_embeddings": False, "qkv_bias": True, "sliding_window": 8}

FAMILIES = {"qwen3": QWEN3, "gpt2": GPT2, "untied": UNTIED}

MESHES_OF_TWO: list[dict[str, Any]] = [
    {"dp": 2},
    {"dp": 2, "reduce": "tree"},
    {"fsdp": 2, "reshard": "zero2"},
    {"fsdp": 2, "reshard": "zero3"},
    {"tp": 2},
]
MESHES_OF_FOUR: list[dict[str, Any]] = [
    {"dp": 4},
    {"dp": 2, "fsdp": 2},
    {"dp": 2, "tp": 2},
    {"fsdp": 2, "tp": 2},
    {"fsdp": 4},
    {"tp": 4},
]


def _model(family_name: str) -> ModelConfig:
    recipe = from_mapping(TrainConfig, {"data": "none", "model": FAMILIES[family_name]})
    return family(recipe)


def _assert_proved(verdict: Verdict) -> None:
    assert not [c for c in verdict.comparisons if not c.ok], verdict
    assert not verdict.unequal_replicas and not verdict.equal_shards, verdict
    assert verdict.ok
    # Gradients that are all but zero would agree with anything. (Without rotation a key's bias
    # adds the same to all scores of a query, which the softmax does not see.)
    tiny = [c.name for c in verdict.comparisons if c.magnitude < 1e-6]
    assert all(name.endswith("k_proj.bias") for name in tiny), tiny


def _id(value: Any) -> str | None:
    return "-".join(f"{k}{v}" for k, v in value.items()) if isinstance(value, dict) else None


@pytest.mark.parametrize("family_name", FAMILIES)
@pytest.mark.parametrize("mesh", MESHES_OF_TWO, ids=_id)
def test_two_ranks_compute_what_one_does(
    two_ranks: Ranks, mesh: dict[str, Any], family_name: str
) -> None:
    config = from_mapping(MeshConfig, mesh)
    _assert_proved(verify_parallel(config, _model(family_name), ranks=two_ranks))


@pytest.mark.parametrize("family_name", FAMILIES)
@pytest.mark.parametrize("mesh", MESHES_OF_FOUR, ids=_id)
def test_four_ranks_compute_what_one_does(
    four_ranks: Ranks, mesh: dict[str, Any], family_name: str
) -> None:
    config = from_mapping(MeshConfig, mesh)
    _assert_proved(verify_parallel(config, _model(family_name), ranks=four_ranks))


def _verify_damaged(damage: str, config: MeshConfig, tiny: ModelConfig) -> Verdict:
    """Prove a mesh whose last rank has something wrong."""
    original = spread

    def damaged(*arguments: Any, **options: Any) -> Any:
        laid = original(*arguments, **options)
        if dist.get_rank() == dist.get_world_size() - 1:
            with torch.no_grad():
                laid.model.get_parameter("model.layers.1.mlp.up_proj.weight")[0, 0] += 1e-6
        if damage == "no reduction":
            assert isinstance(laid.call, DistributedDataParallel)
            laid.call.register_comm_hook(None, _keep)
        return laid

    patch = pytest.MonkeyPatch()
    patch.setattr(module, "spread", damaged)
    try:
        return module._verify_rank(config, tiny)
    finally:
        patch.undo()


def _keep(state: None, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


# torch looks at the annotations themselves, which here are strings.
_keep.__annotations__ = {"bucket": GradBucket, "return": torch.futures.Future[torch.Tensor]}


@pytest.mark.parametrize("damage", ["one replica off", "no reduction"])
def test_damage_is_found(two_ranks: Ranks, damage: str) -> None:
    mesh = MeshConfig(dp=2)
    tiny = module.tiny_model(_model("qwen3"), mesh)
    verdict = two_ranks.run(_verify_damaged, damage, mesh, tiny)[0]
    assert not verdict.ok
    assert verdict.unequal_replicas == ("model.layers.1.mlp.up_proj.weight",)
    assert any(not c.ok for c in verdict.comparisons)


def test_the_command_prints_a_table_and_exits_with_1_on_a_mismatch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: nowhere\nmesh: {dp: 2}\nmodel: {tie_embeddings: false}\n")
    result = CliRunner().invoke(app, [str(recipe)])
    assert result.exit_code == 0, result.output
    assert "lm_head.weight" in result.output and "gradient norm" in result.output
    assert "dp=2: computes what one process does" in result.output
    monkeypatch.setattr(module, "TOLERANCE", 0.0)
    failed = CliRunner().invoke(app, [str(recipe), "--json"])
    assert failed.exit_code == 1 and '"ok": false' in failed.output
