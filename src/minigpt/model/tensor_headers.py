"""Which tensors a safetensors directory holds, from the files' headers alone: no torch here."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from minigpt.core.errors import ModelError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_LENGTH_BYTES = 8
_LARGEST_HEADER = 100_000_000
"""As in the format's own reader."""


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One tensor as its file describes it."""

    name: str
    dtype: str
    """In safetensors' spelling: F32, BF16, I8, ..."""
    shape: tuple[int, ...]
    count: int
    """Elements."""
    num_bytes: int

    @property
    def is_floating(self) -> bool:
        """Whether loading in another precision converts it."""
        return self.dtype.startswith(("F", "BF"))


def weight_files(directory: Path) -> list[Path]:
    """Return the safetensors files that hold a directory's weights.

    Raises:
        ModelError: None there, only pickled ones, a malformed index, or a shard is missing.
    """
    if (directory / INDEX).is_file():
        try:
            shards = set(json.loads((directory / INDEX).read_bytes())["weight_map"].values())
            files = [directory / str(name) for name in sorted(shards)]
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ModelError(f"{directory / INDEX} is not a valid safetensors index") from None
        for file in files:
            if not file.is_file():
                raise ModelError(
                    f"{file} is missing, though {INDEX} names it",
                    remedy="fetch the directory again",
                )
        return files
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    pickled = sorted(directory.glob("*.bin")) + sorted(directory.glob("*.pt*"))
    if pickled:
        raise ModelError(
            f"{pickled[0]} is a pickle, which can run code when loaded",
            remedy="convert it with transformers: "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW)",
        )
    raise ModelError(
        f"{directory} holds no weights: neither {SINGLE} nor {INDEX} is there",
        remedy="give a directory that `minigpt train` or save_pretrained wrote",
    )


def read_headers(files: Iterable[Path]) -> list[TensorHeader]:
    """Read the headers of safetensors files.

    Raises:
        ModelError: A file that is no safetensors file.
    """
    return [header for file in files for header in _read_header(file)]


def _read_header(file: Path) -> list[TensorHeader]:
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            if length > _LARGEST_HEADER:
                raise ValueError(f"a header of {length} bytes")
            tree = json.loads(stream.read(length))
        return [
            TensorHeader(
                name,
                entry["dtype"],
                tuple(entry["shape"]),
                math.prod(entry["shape"]),
                entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for name, entry in tree.items()
            if name != "__metadata__"
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(
            f"{file} is no safetensors file: {error}", remedy="fetch the directory again"
        ) from None
