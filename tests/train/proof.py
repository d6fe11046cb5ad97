"""What the tests of each axis share: a mesh's proof, and what it must show."""

from __future__ import annotations

from typing import Any

from minigpt.core.config import from_mapping
from minigpt.train.config import MeshConfig, TrainConfig
from minigpt.train.processes import Ranks
from minigpt.train.verify_parallel import family, verify_parallel

Case = tuple[dict[str, Any], dict[str, Any]]
"""A mesh, and a model's choices."""

GROUPED: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2}
UNTIED: dict[str, Any] = {"tie_embeddings": False, "qkv_bias": True, "sliding_window": 8}
LEARNED: dict[str, Any] = {"norm": "layernorm", "position": "learned", "mlp": "gelu"}
EXPERTS: dict[str, Any] = GROUPED | {"num_experts": 4, "experts_per_token": 2}


def prove(case: Case, ranks: Ranks) -> set[str]:
    """Assert that the mesh computes what one process does; return the names compared."""
    mesh, choices = case
    recipe = from_mapping(TrainConfig, {"data": "none", "model": choices})
    verdict = verify_parallel(from_mapping(MeshConfig, mesh), family(recipe), ranks=ranks)
    assert verdict.ok, verdict
    # Gradients that are all but zero would agree with anything.
    assert all(c.magnitude > 1e-6 for c in verdict.comparisons)
    return {comparison.name for comparison in verdict.comparisons}


def name_of(value: Any) -> str | None:
    """Name a case by its mesh and what is special of its model."""
    if not isinstance(value, tuple):
        return None
    mesh, choices = value
    kinds = {"num_experts": "moe", "tie_embeddings": "untied", "position": "learned"}
    kind = next((word for key, word in kinds.items() if key in choices), "")
    return "-".join([*(f"{key}{size}" for key, size in mesh.items()), kind]).rstrip("-")
