"""Best-fit packing: whole documents put together into rows with little left over.

A document longer than a row is split into full rows and a remainder. Remainders and short
documents go, the longest first, each into the fullest row that has room for it (best-fit
decreasing; for language models: Ding et al., "Fewer truncations improve language modeling",
2024). What a row lacks in the end is padding. The plan is made once for a dataset, a row length
and a seed, kept in minigpt's home and memory-mapped from there.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from minigpt.core.artifact import create_artifact, is_artifact, open_artifact
from minigpt.core.manifest import Parent
from minigpt.core.storage import home, storage_errors
from minigpt.core.telemetry import get_logger
from minigpt.data.permutation import Permutation
from minigpt.data.shards import TokenDataset

_VERSION = 1

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PackingPlan:
    """Which pieces of the token stream make up each row."""

    rows: Integers
    """Where each row's pieces begin in `starts`, and the end: (num_rows + 1,)."""
    starts: Integers
    """Stream position of each piece's first token, (pieces,)."""
    lengths: Integers
    """Tokens of each piece, (pieces,)."""

    @property
    def num_rows(self) -> int:
        """How many rows there are."""
        return len(self.rows) - 1

    def pieces(self, row: int) -> tuple[Integers, Integers]:
        """Return starts and lengths of a row's pieces, in the order in which they lie."""
        here = slice(self.rows[row], self.rows[row + 1])
        return self.starts[here], self.lengths[here]


def open_plan(
    dataset: TokenDataset, *, sequence_length: int, seed: int, left_out: Integers
) -> PackingPlan:
    """Map the plan of a dataset, made and stored first where there is none yet.

    Every byte of a stored plan is checked against its hash; other processes that want the same
    plan wait while it is made.

    Args:
        dataset: The split to pack.
        sequence_length: Tokens in a row, T.
        seed: Decides which of equally long documents share a row.
        left_out: Documents that are not packed.

    Raises:
        ArtifactError: The stored plan is damaged.
        StorageError: It could not be stored.
    """
    wanted = {
        "plan": "best-fit packing",
        "version": _VERSION,
        "dataset": dataset.fingerprint,
        "split": dataset.split,
        "sequence_length": sequence_length,
        "seed": seed,
        "left_out": hashlib.sha256(left_out.astype("<i8").tobytes()).hexdigest(),
    }
    key = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:32]
    directory = home() / "packing" / key
    with storage_errors(f"write {directory}"):
        directory.parent.mkdir(parents=True, exist_ok=True)
        with directory.with_suffix(".lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not is_artifact(directory):
                plan = make_plan(dataset, sequence_length, seed, left_out)
                _store(plan, directory, dataset, wanted)
    path = open_artifact(directory).path
    names = ("rows", "starts", "lengths")
    return PackingPlan(*(np.load(path / f"{name}.npy", mmap_mode="r") for name in names))


def make_plan(
    dataset: TokenDataset, sequence_length: int, seed: int, left_out: Integers
) -> PackingPlan:
    """Pack a split; every token of a document that is not left out lies in exactly one row."""
    sizes = np.diff(dataset.offsets)
    sizes[left_out] = 0
    full, rest = np.divmod(sizes, sequence_length)
    # Shuffled first, so that equally long documents don't meet in the order of the source.
    order = Permutation(len(sizes), f"{seed}/packing")(np.arange(len(sizes)))
    order = order[np.argsort(-rest[order], kind="stable")]
    order = order[rest[order] > 0]
    row_of, packed_rows = best_fit(rest[order], sequence_length)
    begins = np.asarray(dataset.offsets[:-1])
    owner = np.repeat(np.arange(len(sizes)), full)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(full) - full, full)
    starts = np.concatenate(
        [(begins + full * sequence_length)[order], begins[owner] + number * sequence_length]
    )
    lengths = np.concatenate([rest[order], np.full(len(owner), sequence_length)])
    row_of = np.concatenate([row_of, packed_rows + np.arange(len(owner))])
    by_row = np.argsort(row_of, kind="stable")
    counts = np.bincount(row_of, minlength=packed_rows + len(owner))
    rows = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return PackingPlan(rows, starts[by_row].astype(np.int64), lengths[by_row].astype(np.int64))


def best_fit(lengths: Integers, capacity: int) -> tuple[Integers, int]:
    """Put items into as few rows as best-fit finds.

    Args:
        lengths: Of the items, 1 to `capacity`, in the order in which they are placed.
        capacity: Of a row.

    Returns:
        Each item's row, and the number of rows.
    """
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set where a row has exactly r free
    row_of = []
    count = 0
    for length in lengths.tolist():
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, count
            count += 1
        row_of.append(row)
        left = room - length
        if left:
            by_room[left].append(row)
            rooms |= 1 << left
    return np.array(row_of, np.int64), count


def _store(
    plan: PackingPlan, directory: Path, dataset: TokenDataset, config: dict[str, object]
) -> None:
    parent = Parent(id=dataset.manifest.id, kind="dataset", uri=str(dataset.directory))
    with create_artifact(directory, kind="report", parents=[parent], config=config) as draft:
        for name in ("rows", "starts", "lengths"):
            np.save(draft.path / f"{name}.npy", getattr(plan, name))
        room = plan.num_rows * int(str(config["sequence_length"]))
        tokens = int(plan.lengths.sum())
        draft.metrics = {
            "rows": plan.num_rows,
            "tokens": tokens,
            "efficiency": tokens / room if room else 0.0,
        }
    get_logger("data").info("packed documents into rows", **draft.metrics)
