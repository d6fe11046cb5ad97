from __future__ import annotations

import gzip
import lzma
import random

import pytest

from minigpt.evaluate.baselines import compressor_bits_per_byte


def test_sizes_are_those_of_the_standard_tools() -> None:
    rng = random.Random(0)
    documents = [
        " ".join(rng.choices(["alpha", "beta", "gamma"], k=400)).encode() for _ in range(9)
    ]
    whole = b"".join(documents)
    found = compressor_bits_per_byte(iter(documents), len(whole))
    assert found.gzip == pytest.approx(8 * len(gzip.compress(whole, 9)) / len(whole), rel=1e-3)
    # The window is smaller than xz's own at level 9, which costs nothing on a short stream.
    assert found.xz == pytest.approx(8 * len(lzma.compress(whole, preset=9)) / len(whole), rel=0.01)


def test_random_bytes_do_not_compress() -> None:
    found = compressor_bits_per_byte([random.Random(1).randbytes(50_000)], 50_000)
    assert 8.0 < found.gzip < 8.1 and 8.0 < found.xz < 8.1
