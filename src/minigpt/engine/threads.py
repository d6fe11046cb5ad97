"""How an engine process must be started so that its threads share a machine; no torch here."""

from __future__ import annotations

PROCESS_ENVIRONMENT = {"GOMP_SPINCOUNT": "10000"}
"""For the environment of a process that will import torch: OpenMP reads it only at load.

Between two products torch's threads spin, by default for some 10 ms. Once another process wants
a core that starves the very thread that is waited for. Measured on 2 cores, 124M model, batch 1,
tokens/s alone and beside one busy process: default 51 and 4, 30,000 spins 53 and 10, 10,000
spins 47 and 16, no spinning 31 and 28.
"""
