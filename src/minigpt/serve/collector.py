"""Python's garbage collector in a process that answers requests for months."""

from __future__ import annotations

import gc

_YOUNG_OBJECTS = 700
"""New containers, less those freed, between two young collections: Python's own default."""
_ROUNDS = 2
"""Young collections before a middle one, and middle ones before a full one; Python has 10."""


def spare_what_is_loaded() -> None:
    """Keep the garbage collector from walking what is there now, which stays.

    Full collections are short then and may come often. They should: only they empty the
    interpreter's lists of freed tuples, which fill by some 40 bytes a request up to megabytes. The
    second collection makes the collector forget how many objects it spares, for it puts a full
    collection off until a quarter as many are new.
    """
    gc.collect()
    gc.freeze()
    gc.collect()
    gc.set_threshold(_YOUNG_OBJECTS, _ROUNDS, _ROUNDS)
