"""Reading and writing safetensors directories, in one file or in shards with an index."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minigpt.core.errors import ModelError, StorageError
from minigpt.core.storage import storage_errors
from minigpt.model.tensor_headers import INDEX, SINGLE


def read_tensors(files: list[Path], device: str) -> dict[str, Tensor]:
    """Map the tensors of safetensors files into memory; on the CPU nothing is copied.

    Raises:
        ModelError: A file is corrupt, or two files hold the same tensor.
    """
    tensors: dict[str, Tensor] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt", device=device) as file:
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    if name in tensors:
                        raise ModelError(f"{path} holds {name}, which another shard holds too")
                    tensors[name] = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"can't read {path}: {error}") from None
    return tensors


def write_tensors(directory: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int) -> None:
    """Write tensors in one file, or in shards of at most that size with an index.

    A tensor larger than a shard gets a shard of its own.

    Raises:
        StorageError: A full disk, no permission.
    """
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        if shards[-1] and filled + tensor.nbytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    with storage_errors(f"write {directory}"):
        if len(shards) == 1:
            write_file(directory / SINGLE, shards[0])
            return
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, start=1):
            file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            write_file(directory / file_name, shard)
            weight_map |= dict.fromkeys(shard, file_name)
        total = sum(t.nbytes for shard in shards for t in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (directory / INDEX).write_text(text, encoding="utf-8")


def write_file(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write one safetensors file of tensors that are contiguous and on the CPU.

    Raises:
        StorageError: A full disk.
    """
    try:
        save_file(tensors, path, metadata={"format": "pt"})  # transformers refuses it without
    except SafetensorError as error:
        path.unlink(missing_ok=True)
        raise StorageError(
            f"can't write {path}: {error}", remedy="free space there or choose another directory"
        ) from error
