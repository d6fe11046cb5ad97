"""LoRA: low-rank adapters beside frozen linear layers, merged into them for good at the end.

y = W x + (alpha / rank) B (A x), W frozen, A random, B zero at first, so that an adapted model
begins as its base (Hu et al. 2021, https://arxiv.org/abs/2106.09685). Files are in PEFT's layout
(https://huggingface.co/docs/peft): `adapter_model.safetensors` and `adapter_config.json`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.core.config import from_mapping
from minigpt.core.errors import ConfigError, ModelError
from minigpt.core.storage import storage_errors
from minigpt.model.config import LoraConfig, Projection
from minigpt.model.tensor_files import read_tensors, write_file

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."

# What PEFT can say and this can't do; any other value is refused.
_PLAIN = {
    "bias": "none",
    "use_dora": False,
    "use_rslora": False,
    "fan_in_fan_out": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "layers_to_transform": None,
}


class LoraLinear(nn.Linear):
    """A frozen linear layer with an adapter; its own parameters keep their names.

    Parameters: `weight` (O, I) and `bias` frozen, `lora_A.weight` (R, I), `lora_B.weight` (O, R).
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool, rank: int, alpha: float, p: float
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.lora_A = nn.Linear(in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, out_features, bias=False)
        self.dropout = p
        self.scaling = alpha / rank
        self.enabled = True

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: LoraConfig) -> Self:
        """Take over a layer's own tensors and add an adapter, not yet defined in value."""
        sizes = (linear.in_features, linear.out_features, linear.bias is not None)
        with torch.device("meta"):
            made = cls(*sizes, config.rank, config.alpha, config.dropout)
        made.weight, made.bias = linear.weight, linear.bias
        weight = linear.weight
        for adapter in (made.lora_A, made.lora_B):
            adapter.to_empty(device=weight.device)
        return made.requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (..., I) to (..., O)."""
        outputs = F.linear(inputs, self.weight, self.bias)
        if not self.enabled:
            return outputs
        dropped = F.dropout(inputs, self.dropout, self.training) if self.dropout else inputs
        adapted: Tensor = self.lora_B(self.lora_A(dropped))
        return outputs + self.scaling * adapted

    def merged_weight(self) -> Tensor:
        """Return the (O, I) weight that does both, computed in float32 at least."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        product = self.lora_B.weight.to(wide) @ self.lora_A.weight.to(wide)
        return (self.weight.to(wide) + self.scaling * product).to(self.weight.dtype)


def add_adapters(model: nn.Module, config: LoraConfig, generator: torch.Generator) -> None:
    """Freeze a decoder and put an adapter beside each targeted projection.

    Args:
        model: A decoder whose weights are loaded.
        config: With a rank of at least 1.
        generator: Draws the adapters' A, uniform in +- 1 / sqrt(I) as PEFT has it; on the
            device of the weights. The same state gives the same adapters.

    Raises:
        ModelError: The model has none of the targets (GELU models have no gate_proj), or is int8.
    """
    assert config.rank >= 1
    model.requires_grad_(False)
    found = set()
    for name, module in list(model.named_modules()):
        owner, _, attribute = name.rpartition(".")
        if attribute not in config.targets:
            continue
        if not isinstance(module, nn.Linear):
            raise ModelError(
                f"{name} is a {type(module).__name__}, and adapters go on floating-point layers",
                remedy="start from the model that it was compressed from",
            )
        adapted = LoraLinear.from_linear(module, config)
        with torch.no_grad():
            bound = 1 / math.sqrt(module.in_features)
            adapted.lora_A.weight.uniform_(-bound, bound, generator=generator)
            adapted.lora_B.weight.zero_()
        adapted.lora_A.requires_grad_()
        adapted.lora_B.requires_grad_()
        setattr(model.get_submodule(owner), attribute, adapted)
        found.add(attribute)
    missing = sorted(set(config.targets) - found)
    if missing:
        raise ModelError(f"the model has no {', '.join(missing)}", remedy="set lora.targets")


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Let a model compute as its base within the block."""
    adapted = [module for module in model.modules() if isinstance(module, LoraLinear)]
    for module in adapted:
        module.enabled = False
    try:
        yield
    finally:
        for module in adapted:
            module.enabled = True


def has_adapters(model: nn.Module) -> bool:
    """Tell whether `add_adapters` was here."""
    return any(isinstance(module, LoraLinear) for module in model.modules())


def adapter_config(model: nn.Module) -> LoraConfig | None:
    """Return what `add_adapters` was called with, None where it was not."""
    adapted = {n: m for n, m in model.named_modules() if isinstance(m, LoraLinear)}
    if not adapted:
        return None
    one = next(iter(adapted.values()))
    rank = one.lora_A.out_features
    names = {name.rpartition(".")[2] for name in adapted}
    targets = [name for name in get_args(Projection) if name in names]
    tree = {"rank": rank, "alpha": rank * one.scaling, "dropout": one.dropout, "targets": targets}
    return from_mapping(LoraConfig, tree)


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Return what training changes: everything, or where parameters are frozen the others."""
    state = model.state_dict()
    learns = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    if all(learns.values()):
        return state
    return {name: tensor for name, tensor in state.items() if learns.get(name)}


def load_trained_state(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put back a `trained_state`; the frozen weights stay as they are."""
    expected = trained_state(model).keys()
    assert tensors.keys() == expected, sorted(tensors.keys() ^ expected)[:3]
    model.load_state_dict(tensors, strict=False)


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of the plain model that computes what this one does."""
    state = {name: t for name, t in model.state_dict().items() if not _is_adapter(name)}
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, LoraLinear):
                state[f"{name}.weight"] = module.merged_weight()
    return state


@dataclass(frozen=True)
class Adapter:
    """An adapter's files, read."""

    config: LoraConfig
    tensors: dict[str, Tensor]
    """By the decoder's names."""
    base: str
    """Where the base model was, as the file says."""

    def apply(self, model: nn.Module) -> None:
        """Put the adapter onto its base model; errors as `prepare`."""
        self.prepare(model)
        load_trained_state(model, self.tensors)

    def prepare(self, model: nn.Module) -> None:
        """Put an adapter of this shape, undefined in value, onto a model, perhaps on `meta`.

        Raises:
            ModelError: It has other layers or shapes than the model.
        """
        add_adapters(model, self.config, torch.Generator())
        expected = trained_state(model)
        if wrong := sorted(expected.keys() ^ self.tensors.keys()):
            raise ModelError(f"the adapter is not this model's: {wrong[0]} is in one alone")
        for name, tensor in expected.items():
            if tensor.shape != self.tensors[name].shape:
                raise ModelError(
                    f"the adapter is not this model's: {name} is {tuple(self.tensors[name].shape)} "
                    f"there and {tuple(tensor.shape)} here"
                )


def save_adapter(directory: Path, model: nn.Module, config: LoraConfig, base: str) -> None:
    """Write a model's adapters in PEFT's layout.

    Args:
        directory: An existing one.
        model: After `add_adapters`.
        config: What they were made with.
        base: Path of the base model, for the file.

    Raises:
        StorageError: A full disk, no permission.
    """
    tensors = {
        f"{_PREFIX}{name}": tensor.detach().cpu().contiguous()
        for name, tensor in trained_state(model).items()
    }
    with storage_errors(f"write {directory}"):
        write_file(directory / WEIGHTS, tensors)
        (directory / CONFIG).write_text(render_config(config, base))


def render_config(config: LoraConfig, base: str) -> str:
    """Return the text of an `adapter_config.json`: what adapters are, and of which base model."""
    tree = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": sorted(config.targets),
        "inference_mode": True,
        "init_lora_weights": True,
        **_PLAIN,
    }
    return json.dumps(tree, indent=2, sort_keys=True) + "\n"


def load_adapter(directory: Path) -> Adapter:
    """Read an adapter in PEFT's layout.

    Raises:
        ModelError: No adapter there, or one of a kind that is not plain LoRA on the decoder's
            projections; the message names the setting.
    """
    config, base = load_adapter_config(directory)
    stored = read_tensors([directory / WEIGHTS], "cpu")
    tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in stored.items()}
    return Adapter(config, tensors, base)


def load_adapter_config(directory: Path) -> tuple[LoraConfig, str]:
    """Read a directory's `adapter_config.json` alone: the adapters, and where their base was.

    Raises:
        ModelError: As of `load_adapter`.
    """
    try:
        tree: dict[str, Any] = json.loads((directory / CONFIG).read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(
            f"no adapter at {directory}: can't read {CONFIG}: {error}",
            remedy="give a directory with adapter_config.json and adapter_model.safetensors",
        ) from None
    settings = {"peft_type": "LORA", **_PLAIN}
    for key, plain in settings.items():
        if (tree.get(key) or None) != (plain or None) and key in tree:
            raise ModelError(f"{directory / CONFIG}: {key} = {tree[key]!r} is not supported")
    targets = tree.get("target_modules") or []
    named = [targets] if isinstance(targets, str) else targets
    if unknown := sorted(set(named) - set(get_args(Projection))):
        raise ModelError(
            f"{directory / CONFIG}: target_modules {unknown} are not supported",
            remedy=f"adapters go on {', '.join(get_args(Projection))}",
        )
    try:
        config = from_mapping(
            LoraConfig,
            {
                "rank": tree.get("r"),
                "alpha": tree.get("lora_alpha"),
                "dropout": tree.get("lora_dropout", 0.0),
                "targets": sorted(named),
            },
        )
    except ConfigError as error:
        raise ModelError(f"{directory / CONFIG}: {error}") from None
    return config, str(tree.get("base_model_name_or_path") or "")


def _is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name
