"""Models, objectives and meshes that `bench.memory` measures, as changes to one of them.

`FITTED` are those on which the memory estimate was worked out. `HELD_OUT` were chosen before it
was tried on them and have changed nothing in it; one that does moves to the others.
"""

from __future__ import annotations

from typing import Any

BASE: dict[str, Any] = {
    "layers": 4,
    "width": 128,
    "heads": 2,
    "kv": 2,
    "length": 128,
    "rows": 4,
    "micro": 1,
    "vocab": 2048,
}
GPT2 = {
    "norm": "layernorm",
    "position": "learned",
    "mlp": "gelu",
    "qk_norm": False,
    "qkv_bias": True,
    "output_bias": True,
    "mlp_bias": True,
}
_ADAMW = {"optimizer": {"kind": "adamw"}}
_BFLOAT16 = {"precision": "bfloat16"}
_WIDTH_64 = {"width": 64, "heads": 1, "kv": 1}
_WIDTH_256 = {"width": 256, "heads": 4, "kv": 1}
_WIDTH_384 = {"width": 384, "heads": 6, "kv": 6}
_SMALL_EXPERTS = {"experts_per_token": 3, "expert_intermediate_size": 96}
_DPO = {"kind": "dpo"}
_DISTILL = {"kind": "distill", "teacher": "none"}

FITTED: dict[str, dict[str, Any]] = {
    "base, Muon": {},
    "AdamW": {"optimizer": {"kind": "adamw"}},
    "accumulation": {"micro": 4},
    "deep": {"layers": 12},
    "wide": {"layers": 2, "width": 512, "heads": 8, "kv": 8},
    "long": {"length": 512, "rows": 2},
    "many rows": {"rows": 16},
    "grouped queries": {"kv": 1},
    "GPT-2 family": {"family": GPT2},
    "untied": {"family": {"tie_embeddings": False}},
    "large vocabulary": {"vocab": 16384, "layers": 2},
    "bfloat16": {"precision": "bfloat16"},
    "bfloat16, many rows": {"precision": "bfloat16", "rows": 16},
    "checkpoint full": {"rows": 16, "memory": {"checkpoint": "full"}},
    "checkpoint selective": {"rows": 16, "memory": {"checkpoint": "selective"}},
    "dp 2": {"mesh": {"dp": 2}},
    "dp 2, tree": {"mesh": {"dp": 2, "reduce": "tree"}, "micro": 4},
    "fsdp 2, zero3": {"mesh": {"fsdp": 2}},
    "fsdp 2, zero2": {"mesh": {"fsdp": 2, "reshard": "zero2"}},
    "tp 2": {"mesh": {"tp": 2}, "rows": 8},
    "384 wide, AdamW": {"layers": 3, **_WIDTH_384, "rows": 3, "length": 192, **_ADAMW},
    "narrow, deep, bfloat16": {"layers": 10, **_WIDTH_64, "rows": 6, "length": 256, **_BFLOAT16},
    "GPT-2, bfloat16, accumulation": {"family": GPT2, "micro": 3, "rows": 6, **_BFLOAT16},
    "row of 1280": {"length": 1280, "rows": 2, "layers": 3},
    "vocabulary 24,000, untied": {"vocab": 24000, "family": {"tie_embeddings": False}, **_ADAMW},
    "4 queries a key, full, bfloat16": {
        **_WIDTH_256,
        "rows": 10,
        "memory": {"checkpoint": "full"},
        **_BFLOAT16,
    },
    "budget 2 of 6 layers": {
        "layers": 6,
        "rows": 8,
        "memory": {"checkpoint": "budget", "budget_mb": 100, "checkpoint_layers": 2},
    },
    "experts": {"family": {"num_experts": 4, "expert_intermediate_size": 128}, "rows": 6},
    "LoRA": {"rows": 6, "lora": {"rank": 8}},
    "LoRA, bfloat16": {"rows": 12, **_WIDTH_256, "lora": {"rank": 16}, **_BFLOAT16},
    "LoRA, queries and values": {
        "layers": 6,
        "rows": 6,
        "lora": {"rank": 4, "targets": ["q_proj", "v_proj"]},
    },
    "LoRA, full": {"rows": 16, "lora": {"rank": 32}, "memory": {"checkpoint": "full"}},
    "DPO": {"rows": 6, "objective": _DPO},
    "DPO, bfloat16, accumulation": {
        "rows": 8,
        **_WIDTH_256,
        "micro": 2,
        "objective": _DPO,
        **_BFLOAT16,
    },
    "DPO, LoRA": {"rows": 8, "lora": {"rank": 8}, "objective": _DPO},
    "distillation": {"rows": 6, "teacher": _WIDTH_256, "objective": _DISTILL},
    "distillation, JSD, bfloat16": {
        "rows": 4,
        "vocab": 6144,
        "teacher": {"layers": 8},
        "objective": _DISTILL | {"divergence": "jsd"},
        **_BFLOAT16,
    },
    "dp 2, bfloat16": {"mesh": {"dp": 2}, "rows": 8, "micro": 2, **_BFLOAT16},
    "dp 2, LoRA": {"mesh": {"dp": 2}, "rows": 6, "lora": {"rank": 8}},
    "fsdp 2, LoRA": {"mesh": {"fsdp": 2}, "rows": 6, "lora": {"rank": 8}},
    "fsdp 2, DPO": {"mesh": {"fsdp": 2}, "rows": 4, "objective": _DPO},
    "fsdp 2, bfloat16": {"mesh": {"fsdp": 2}, "rows": 8, **_WIDTH_256, **_BFLOAT16},
    "fsdp 4": {"mesh": {"fsdp": 4}, "rows": 6, "layers": 8, **_ADAMW},
    "dp 2 x fsdp 2": {"mesh": {"dp": 2, "fsdp": 2}, "rows": 6, "micro": 2},
    "fsdp 2 x tp 2": {"mesh": {"fsdp": 2, "tp": 2}, "rows": 8},
    "tp 4": {"mesh": {"tp": 4}, **_WIDTH_256, "kv": 4, "rows": 6},
    "tp 2, bfloat16": {"mesh": {"tp": 2}, **_WIDTH_384, "rows": 6, **_BFLOAT16},
    "pp 2": {"mesh": {"pp": 2}, "rows": 4, "micro": 4, "layers": 6},
    "pp 2, gpipe": {"mesh": {"pp": 2, "schedule": "gpipe"}, "micro": 4, "layers": 6},
    "pp 4": {"mesh": {"pp": 4}, "micro": 8, "layers": 8, "rows": 2, "length": 256},
    "pp 2 x dp 2": {"mesh": {"pp": 2, "dp": 2}, "micro": 2, "rows": 6, **_ADAMW},
    "cp 2": {"mesh": {"cp": 2}, "length": 512, "rows": 4},
    "ep 2": {
        "mesh": {"ep": 2},
        "family": {"num_experts": 4, "expert_intermediate_size": 192},
        "rows": 6,
    },
    "LoRA, MLP, GPT-2": {
        "family": GPT2,
        "rows": 10,
        "lora": {"rank": 24, "targets": ["up_proj", "down_proj"]},
    },
    "LoRA, dropout": {"rows": 7, **_WIDTH_256, "lora": {"rank": 8, "dropout": 0.1}},
    "pp 2, interleaved": {
        "mesh": {"pp": 2, "schedule": "interleaved", "virtual_stages": 2},
        "layers": 8,
        "micro": 4,
    },
    "pp 2, zero-bubble": {
        "mesh": {"pp": 2, "schedule": "zero-bubble", "virtual_stages": 2},
        "layers": 8,
        "micro": 4,
    },
}
HELD_OUT: dict[str, dict[str, Any]] = {
    "512 wide, 8 layers": {
        "layers": 8,
        "width": 512,
        "heads": 8,
        "kv": 2,
        "rows": 8,
        "length": 256,
        "vocab": 8000,
    },
    "GPT-2, selective, bfloat16": {
        "family": GPT2,
        **_WIDTH_384,
        "rows": 12,
        "memory": {"checkpoint": "selective"},
        **_BFLOAT16,
    },
    "row of 1536, bfloat16": {"length": 1536, "rows": 2, "layers": 5, **_BFLOAT16},
    "narrow, vocabulary 12,000": {"layers": 5, **_WIDTH_64, "vocab": 12000, "rows": 9},
    "budget 5 of 7 layers, AdamW": {
        "layers": 7,
        "rows": 10,
        "memory": {"checkpoint": "budget", "budget_mb": 100, "checkpoint_layers": 5},
        **_ADAMW,
    },
    "8 experts, bfloat16": {"family": {"num_experts": 8, **_SMALL_EXPERTS}, **_BFLOAT16},
    "LoRA, output and MLP": {
        "layers": 5,
        "rows": 5,
        "lora": {"rank": 12, "targets": ["o_proj", "gate_proj", "down_proj"]},
    },
    "LoRA, dropout, bfloat16": {
        "rows": 8,
        "lora": {"rank": 8, "dropout": 0.2},
        **_BFLOAT16,
    },
    "LoRA, accumulation, bfloat16": {
        **_WIDTH_384,
        "rows": 5,
        "micro": 3,
        "lora": {"rank": 64},
        **_BFLOAT16,
    },
    "DPO, full": {"rows": 14, "memory": {"checkpoint": "full"}, "objective": _DPO},
    "DPO, LoRA, bfloat16": {**_WIDTH_384, "lora": {"rank": 16}, "objective": _DPO, **_BFLOAT16},
    "DPO, vocabulary 10,000": {"vocab": 10000, "rows": 4, "length": 200, "objective": _DPO},
    "distillation, reverse KL": {
        "vocab": 5000,
        "rows": 3,
        "teacher": _WIDTH_384,
        "objective": _DISTILL | {"divergence": "reverse-kl"},
    },
    "distillation, LoRA, bfloat16": {
        "rows": 5,
        **_WIDTH_256,
        "lora": {"rank": 8},
        "teacher": {"layers": 9, **_WIDTH_384},
        "objective": _DISTILL,
        **_BFLOAT16,
    },
    "dp 2, DPO, accumulation": {"mesh": {"dp": 2}, "micro": 2, "rows": 6, "objective": _DPO},
    "dp 4, tree, bfloat16": {"mesh": {"dp": 4, "reduce": "tree"}, "micro": 2, **_BFLOAT16},
    "fsdp 2, zero2, bfloat16": {
        "mesh": {"fsdp": 2, "reshard": "zero2"},
        **_WIDTH_384,
        "micro": 2,
        **_BFLOAT16,
    },
    "fsdp 2, 512 wide": {"mesh": {"fsdp": 2}, "layers": 3, "width": 512, "heads": 8, "kv": 8},
    "fsdp 4, DPO, LoRA": {
        "mesh": {"fsdp": 4},
        **_WIDTH_256,
        "rows": 6,
        "lora": {"rank": 8},
        "objective": _DPO,
    },
    "fsdp 2, distillation": {
        "mesh": {"fsdp": 2},
        "rows": 5,
        "teacher": _WIDTH_256,
        "objective": _DISTILL,
    },
    "tp 2, AdamW, long": {"mesh": {"tp": 2}, "length": 448, "rows": 3, **_ADAMW},
    "dp 2 x tp 2, bfloat16": {"mesh": {"dp": 2, "tp": 2}, "layers": 7, "rows": 8, **_BFLOAT16},
    "pp 2, bfloat16": {"mesh": {"pp": 2}, **_WIDTH_256, "layers": 7, "micro": 3, **_BFLOAT16},
    "pp 2, interleaved, narrow": {
        "mesh": {"pp": 2, "schedule": "interleaved", "virtual_stages": 3},
        **_WIDTH_64,
        "layers": 9,
        "micro": 6,
    },
    "pp 2, zero-bubble, 256 wide": {
        "mesh": {"pp": 2, "schedule": "zero-bubble"},
        **_WIDTH_256,
        "layers": 6,
        "micro": 4,
    },
    "pp 2 x fsdp 2": {"mesh": {"pp": 2, "fsdp": 2}, "layers": 6, "rows": 3, "micro": 4},
    "pp 2 x tp 2": {"mesh": {"pp": 2, "tp": 2}, "layers": 6, "rows": 6, "micro": 2},
    "cp 4, bfloat16": {"mesh": {"cp": 4}, "length": 1024, "rows": 3, **_BFLOAT16},
    "ep 2, bfloat16": {
        "mesh": {"ep": 2},
        "family": {"num_experts": 8, **_SMALL_EXPERTS},
        "rows": 5,
        **_BFLOAT16,
    },
    "ep 2 x fsdp 2": {
        "mesh": {"ep": 2, "fsdp": 2},
        "family": {"num_experts": 4, **_SMALL_EXPERTS},
        "rows": 4,
    },
}
