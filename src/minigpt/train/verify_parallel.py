"""Proof that a mesh computes what one process computes, on a tiny copy of the model.

In float64, on the CPU, with as many real processes as the mesh has: each parameter's gradient is
compared with that of one process, with unequal numbers of targets in the micro-batches and with
and without accumulation; replicas must be equal and tensor parallel shards must differ.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from minigpt.core.config import from_mapping
from minigpt.data.loader import Batch
from minigpt.model.config import ModelConfig
from minigpt.model.decoder import Decoder
from minigpt.model.weights import load_model
from minigpt.train.config import MeshConfig, TrainConfig
from minigpt.train.gradients import cut_axes, gradient_norm, local
from minigpt.train.mesh import check_model
from minigpt.train.objective import IGNORED_TARGET
from minigpt.train.parallelize import Spread, alone, spread
from minigpt.train.processes import Ranks, mesh_of
from minigpt.train.step import StepOptions, make_passes
from minigpt.train.tree import check_tree

TOLERANCE = 1e-10
ACCUMULATIONS = (1, 4)
_CHUNK = 12


@dataclass(frozen=True)
class Comparison:
    """One quantity in which the mesh is compared with one process."""

    name: str
    """A parameter, "loss" or "gradient norm"."""
    layout: str
    """How a parameter lies on the mesh."""
    errors: tuple[float, ...]
    """Largest absolute difference, for each of `ACCUMULATIONS`."""
    magnitude: float
    """Largest absolute value in one process."""

    @property
    def ok(self) -> bool:
        """Whether all differences are within the tolerance; a NaN is not."""
        return all(error <= TOLERANCE for error in self.errors)


@dataclass(frozen=True)
class Verdict:
    """What a mesh's proof came to."""

    comparisons: tuple[Comparison, ...]
    unequal_replicas: tuple[str, ...]
    """Parameters of which two ranks should hold the same and do not."""
    equal_shards: tuple[str, ...]
    """Matrices of which two tensor parallel ranks hold the same."""

    @property
    def ok(self) -> bool:
        """Whether the mesh computes what one process does."""
        failed = [c for c in self.comparisons if not c.ok]
        return not (failed or self.unequal_replicas or self.equal_shards)


def verify_parallel(mesh: MeshConfig, model: ModelConfig, *, ranks: Ranks | None = None) -> Verdict:
    """Run the proof for a mesh and a tiny model of the same family.

    Args:
        mesh: Started here as processes over gloo, whatever device the run will have.
        model: The architecture whose choices (not sizes) the tiny copy has.
        ranks: Processes to use, as many as the mesh has; None starts and ends them.

    Raises:
        ConfigError: The mesh can't be.
        TrainingError: A process failed.
    """
    tiny = tiny_model(model, mesh)
    for accumulation in ACCUMULATIONS:
        count = accumulation * mesh.data_size
        check_model(mesh, tiny, micro_batches=count, sequence_length=tiny.context_length)
        if mesh.reduce == "tree":
            check_tree(count, mesh.data_size)
    if ranks is not None:
        return ranks.run(_verify_rank, mesh, tiny)[0]  # type: ignore[no-any-return]
    with Ranks(mesh.size) as started:
        return started.run(_verify_rank, mesh, tiny)[0]  # type: ignore[no-any-return]


def family(recipe: TrainConfig) -> ModelConfig:
    """Return a model config with a recipe's choices; sizes that it leaves to "auto" are made up.

    Raises:
        ModelError: The weights to initialize from can't be read.
    """
    if recipe.initialize_from is not None:
        return load_model(recipe.initialize_from).config
    given = {name: value for name, value in dict(recipe.model).items() if value != "auto"}
    keys = given.get("num_kv_heads", given.get("num_heads", 2))
    heads = given.get("num_heads", 2 * keys if "num_kv_heads" in given else keys)
    sizes = ("vocab_size", "num_layers", "hidden_size", "intermediate_size", "context_length")
    made = dict.fromkeys((*sizes, "head_dim"), 8)
    counts = {"num_heads": heads, "num_kv_heads": keys}
    return from_mapping(ModelConfig, made | given | counts, origin="model")


def tiny_model(model: ModelConfig, mesh: MeshConfig) -> ModelConfig:
    """Return a model with the same parts, small, whose sizes fit the mesh."""
    keys = mesh.tp
    grouped = model.num_kv_heads < model.num_heads
    length = 8 * mesh.tp * mesh.cp
    return model.replace(
        vocab_size=24 * mesh.tp,
        num_layers=max(2, mesh.pp * mesh.virtual_stages),
        hidden_size=16,
        num_heads=2 * keys if grouped else keys,
        num_kv_heads=keys,
        head_dim=4,
        intermediate_size=12 * mesh.tp,
        context_length=length,
        sliding_window=None if model.sliding_window is None else length // 2,
        eos_token_id=None,
        bos_token_id=None,
        stop_token_ids=(),
    )


def make_batch(model: ModelConfig, number: int, rows: int = 2) -> Batch:
    """Make up micro-batch `number`: packed documents, with a number of targets of its own."""
    assert rows >= 2
    generator = torch.Generator().manual_seed(1000 + number)
    length = model.context_length
    shape = (rows, length)
    tokens = torch.randint(0, model.vocab_size, shape, generator=generator)
    targets = torch.randint(0, model.vocab_size, shape, generator=generator)
    targets[0, : (5 * number + 1) % length] = IGNORED_TARGET
    targets[1, (3 * number) % length :] = IGNORED_TARGET
    split = 1 + (3 * number) % (length - 1)
    documents = torch.zeros(shape, dtype=torch.int32)
    documents[:, split:] = 1
    positions = torch.arange(length).repeat(rows, 1)
    positions[:, split:] -= split
    return Batch(tokens, targets, positions, documents)


def _verify_rank(config: MeshConfig, model_config: ModelConfig) -> Verdict:
    mesh = mesh_of(config)
    model = spread(_fresh(model_config), mesh, dtype=torch.float64)
    unequal, equal = _compare_copies(model)
    errors: dict[str, list[float]] = defaultdict(list)
    magnitudes: dict[str, float] = {}
    for accumulation in ACCUMULATIONS:
        count = accumulation * mesh.data_size
        expected = _gradients(alone(_fresh(model_config)), model_config, range(count), count)
        found = _gradients(model, model_config, mesh.micro_batches(count), count)
        assert found.keys() <= expected.keys()  # a pipeline stage has some of them
        for name, value in found.items():
            errors[name].append(float((value - expected[name]).abs().max()))
            magnitudes[name] = float(expected[name].abs().max())
    layouts = {name: _layout(p) for name, p in model.model.named_parameters()}
    comparisons = [
        Comparison(name, layouts.get(name, ""), tuple(errors[name]), magnitudes[name])
        for name in errors
    ]
    everywhere = _gather([comparisons, unequal, equal])
    worst: dict[str, Comparison] = {}
    for part, _, _ in everywhere:
        for c in part:
            known = worst.get(c.name, c)
            pairs = zip(known.errors, c.errors, strict=True)
            both = tuple(a if a >= b else b for a, b in pairs)  # b where either is NaN
            worst[c.name] = Comparison(c.name, c.layout, both, c.magnitude)
    return Verdict(
        tuple(worst.values()),
        tuple(sorted({name for _, names, _ in everywhere for name in names})),
        tuple(sorted({name for _, _, names in everywhere for name in names})),
    )


def _fresh(config: ModelConfig) -> Decoder:
    """Make a model whose every parameter, norms and biases too, has values of its own."""
    model = Decoder(config).double()
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.2 * noise)
    return model


def _gradients(laid: Spread, config: ModelConfig, mine: range, count: int) -> dict[str, Tensor]:
    """Return the whole gradients of a global batch of `count` micro-batches, with its loss."""
    laid.model.zero_grad()
    valid = sum(int((make_batch(config, m).targets != IGNORED_TARGET).sum()) for m in range(count))
    passes = make_passes(laid, StepOptions(_CHUNK, torch.float64))
    total = passes.run([make_batch(config, m) for m in mine], valid, lambda: False)
    assert total is not None
    parameters = dict(laid.model.named_parameters())
    norm = gradient_norm(list(parameters.values()), laid.mesh, laid.cuts)
    found = {"loss": torch.tensor(total / valid, dtype=torch.float64), "gradient norm": norm}
    for name, parameter in parameters.items():
        gradient = parameter.grad
        assert gradient is not None, name
        whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        found[name] = whole.clone()
    laid.model.zero_grad()
    return found


def _compare_copies(laid: Spread) -> tuple[list[str], list[str]]:
    """Name parameters that differ where ranks have copies, and that agree where they have shards.

    Over all ranks, which each return the same.
    """
    mesh = laid.mesh
    held: dict[str, tuple[tuple[int, ...], tuple[int, ...], str]] = {}
    for name, parameter in laid.model.named_parameters():
        cut = cut_axes(parameter, laid.cuts)
        place = tuple(mesh.rank(axis) for axis in ("pp", *cut))
        data = local(parameter.detach()).contiguous()
        digest = hashlib.sha256(data.numpy().tobytes()).hexdigest()
        is_shard = "tp" in cut and data.numel() > 0
        held[name] = place, (mesh.rank("tp"),) if is_shard else (), digest
    unequal, equal = set(), set()
    everywhere = _gather(held)
    for name in {name for one in everywhere for name in one}:
        copies = [one[name] for one in everywhere if name in one]
        by_place = defaultdict(set)
        for place, _, digest in copies:
            by_place[place].add(digest)
        if any(len(digests) > 1 for digests in by_place.values()):
            unequal.add(name)
        shards = [(rank, digest) for _, rank, digest in copies if rank]
        owners = defaultdict(set)
        for rank, digest in shards:
            owners[digest].add(rank)
        if any(len(ranks) > 1 for ranks in owners.values()):
            equal.add(name)
    return sorted(unequal), sorted(equal)


def _layout(parameter: Tensor) -> str:
    if not isinstance(parameter, DTensor):
        return "whole"
    names = parameter.device_mesh.mesh_dim_names
    assert names is not None
    parts = [
        f"{name}: rows" if getattr(placement, "dim", None) == 0 else f"{name}: columns"
        for name, placement in zip(names, parameter.placements, strict=True)
        if not placement.is_replicate()
    ]
    return ", ".join(parts) or "copies"


def _gather(value: Any) -> list[Any]:
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered
