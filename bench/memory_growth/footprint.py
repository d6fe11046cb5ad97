"""What a running process holds, as Linux counts it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Footprint:
    """One process at one moment; memory in bytes."""

    anonymous: int
    """Heap and stacks: what a leak adds to. File pages, which the system may drop, are out."""
    pss: int
    """Resident, with shared pages divided among those who share them."""
    rss: int
    files: int
    """Open file descriptors."""
    threads: int

    @classmethod
    def of(cls, pid: int) -> Footprint:
        """Read `/proc/PID`."""
        process = Path("/proc", str(pid))
        memory = parse_smaps((process / "smaps_rollup").read_text())
        return cls(
            anonymous=memory["Anonymous"],
            pss=memory["Pss"],
            rss=memory["Rss"],
            files=len(list((process / "fd").iterdir())),
            threads=len(list((process / "task").iterdir())),
        )


def parse_smaps(text: str) -> dict[str, int]:
    """Return the fields of `smaps_rollup` in bytes."""
    fields = {}
    for line in text.splitlines()[1:]:
        name, _, value = line.partition(":")
        fields[name] = int(value.split()[0]) * 1024
    return fields
