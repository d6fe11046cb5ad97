"""From a checkpoint's files to this rank's tensors, whatever number of ranks wrote them."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from minigpt.core.artifact import Artifact
from minigpt.core.errors import ModelError
from minigpt.train.checkpoint_chunks import State, as_tensor, empty_like, verify
from minigpt.train.checkpoint_storage import DTYPES, Index, load_chunks, read_index
from minigpt.train.world import World

ALL = ("model", "optimizer", "rng")


def load_tensors(
    artifact: Artifact, layout: State | None, world: World, sections: Collection[str] = ALL
) -> dict[str, dict[str, Tensor]]:
    """Load and verify tensors of a checkpoint; every rank of `world` calls this.

    Args:
        artifact: The checkpoint; its files are here.
        layout: This rank's model tensors, to lay the weights and their optimizer state out like.
            None loads every tensor whole.
        world: Who loads.
        sections: Which of `model`, `optimizer` and `rng`.

    Returns:
        Tensors by section and name. The generators are those of the saved rank that this rank
        takes after: rank r modulo the number of saved ranks.

    Raises:
        ArtifactError: A file can't be read, or a value is not the saved one; on every rank.
        ModelError: The checkpoint is of another model than `layout`; on every rank.
    """
    index = world.together(lambda: read_index(artifact.path))
    entries = artifact.manifest.tensors
    layouts: dict[str, Tensor | None] = {}
    if "model" in sections:
        layouts |= world.together(lambda: _model_layouts(artifact, index, layout))
        _check_all_taken(artifact, index, layouts, world)
    if "optimizer" in sections:
        layouts |= _optimizer_layouts(artifact, index, layout)
    if "rng" in sections:
        prefix = f"rng/{world.rank % index.world_size:05d}/"
        layouts |= dict.fromkeys(name for name in index.tensors if name.startswith(prefix))
    chunks = {
        name: empty_like(like, DTYPES[entries[name].dtype], entries[name].shape)
        for name, like in layouts.items()
    }
    load_chunks(chunks, artifact, index, world)
    verify(chunks, entries, world)
    found: dict[str, dict[str, Tensor]] = {section: {} for section in sections}
    for name, chunk in chunks.items():
        section, _, key = name.partition("/")
        key = key.partition("/")[2] if section == "rng" else key
        found[section][key] = as_tensor(chunk, layouts[name])
    return found


def _model_layouts(
    artifact: Artifact, index: Index, layout: State | None
) -> dict[str, Tensor | None]:
    if layout is None:
        return dict.fromkeys(name for name in index.tensors if name.startswith("model/"))
    for key, tensor in layout.items():
        entry = artifact.manifest.tensors.get(f"model/{key}")
        if entry is None or entry.shape != tuple(tensor.shape):
            there = f"shape {entry.shape}" if entry else "no such tensor"
            raise ModelError(
                f"{key} has shape {tuple(tensor.shape)} here, but {artifact.uri} has {there}",
                remedy="resume with the model that the run began with",
            )
    return {f"model/{key}": tensor for key, tensor in layout.items()}


def _check_all_taken(
    artifact: Artifact, index: Index, layouts: dict[str, Tensor | None], world: World
) -> None:
    taken: set[str] = set().union(*world.gather(set(layouts)))
    left = {name for name in index.tensors if name.startswith("model/")} - taken
    if left:
        raise ModelError(
            f"{artifact.uri} has {min(left)}, but the model here has no such tensor",
            remedy="resume with the model that the run began with",
        )


def _optimizer_layouts(
    artifact: Artifact, index: Index, layout: State | None
) -> dict[str, Tensor | None]:
    """State of a parameter's shape lies as the parameter does; any other is whole on its ranks."""
    names = [name for name in index.tensors if name.startswith("optimizer/")]
    if layout is None:
        return dict.fromkeys(names)
    found: dict[str, Tensor | None] = {}
    for name in names:
        like = layout.get(name.partition("/")[2].rpartition("/")[0])
        if like is not None:
            same = artifact.manifest.tensors[name].shape == tuple(like.shape)
            found[name] = like if same else None
    return found
