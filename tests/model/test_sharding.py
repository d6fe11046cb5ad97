"""Parts of a model: together they are the whole, and a rank holds no more than its own."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from minigpt.core.errors import ConfigError
from minigpt.model.config import ModelConfig
from minigpt.model.decoder import Decoder
from minigpt.model.linear import quantize_module
from minigpt.model.sharding import Shard, check_ranks, cut_axis, is_added_once
from minigpt.model.weights import load_model, save_model


@given(length=st.integers(0, 10_000), ranks=st.integers(1, 16))
def test_parts_cover_a_length_once_and_evenly(length: int, ranks: int) -> None:
    bounds = [Shard(rank, ranks).bounds(length) for rank in range(ranks)]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == length
    assert all(one[1] == other[0] for one, other in itertools.pairwise(bounds))
    sizes = [stop - first for first, stop in bounds]
    assert max(sizes) - min(sizes) <= 1
    assert sizes[-1] == max(sizes)  # what `preflight` relies on


def _together(name: str, parts: list[torch.Tensor]) -> torch.Tensor:
    axis = cut_axis(name, parts[0].dim())
    if axis is not None:
        return torch.cat(parts, dim=axis)
    if is_added_once(name):  # the first one's, and zeros
        return torch.stack(parts).sum(0)
    assert all(torch.equal(part, parts[0]) for part in parts)
    return parts[0]


@pytest.mark.parametrize("int8", [False, True])
def test_loaded_parts_are_the_whole(
    family: str, int8: bool, hf_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    path = hf_directory(family)
    whole = load_model(path)
    if int8:
        quantize_module(whole.model)
        save_model(tmp_path, whole.model, whole.config)
        path = tmp_path
    if whole.config.num_kv_heads % 2:
        pytest.skip("one KV head is one rank's")
    parts = [load_model(path, shard=Shard(rank, 2)).model for rank in range(2)]
    state = whole.model.state_dict()
    for name, tensor in state.items():
        found = _together(name, [part.state_dict()[name] for part in parts])
        assert torch.equal(found, tensor), name
    held = sum(t.numel() for t in parts[0].state_dict().values())
    assert held < 0.75 * sum(t.numel() for t in state.values())


def test_uneven_widths_are_refused_with_those_that_fit() -> None:
    config = ModelConfig(
        vocab_size=100, num_layers=1, hidden_size=32, num_heads=12, num_kv_heads=6, head_dim=8,
        intermediate_size=60, context_length=16,
    )  # fmt: skip
    for ranks in (1, 2, 3, 6):
        check_ranks(config, ranks)
    with pytest.raises(ConfigError, match=r"num_kv_heads = 6 \(one of 1, 2, 3, 6\)"):
        check_ranks(config, 4)


_MEASURE = """
import sys
from pathlib import Path
from minigpt.model.sharding import Shard
from minigpt.model.weights import load_model
import torch
from minigpt.model.config import ModelConfig
from minigpt.model.decoder import Decoder
with torch.device("meta"):  # imports much, at its first use
    Decoder(ModelConfig.model_validate_json(sys.argv[3]))

def held(key):
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{key}:")[1].split()[0]) * 1024

shard = None if sys.argv[2] == "0" else Shard(1, int(sys.argv[2]))
before = held("RssAnon"), held("VmRSS")
loaded = load_model(sys.argv[1], shard=shard, verify=False)
for tensor in loaded.model.state_dict().values():
    tensor.sum()  # whatever is mapped is read
print(held("RssAnon") - before[0], held("VmRSS") - before[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_rank_holds_its_part_alone(tmp_path: Path) -> None:
    """A model of 100 MB, of which each of four ranks keeps a quarter and the norms."""
    config = ModelConfig(
        vocab_size=8192, num_layers=4, hidden_size=512, num_heads=8, num_kv_heads=8, head_dim=64,
        intermediate_size=2048, context_length=64, tie_embeddings=False,
    )  # fmt: skip
    save_model(tmp_path, Decoder(config), config)
    whole = sum(t.nbytes for t in load_file(tmp_path / "model.safetensors").values())
    assert whole > 100e6

    def measure(ranks: int) -> tuple[int, int]:
        done = subprocess.run(
            [sys.executable, "-c", _MEASURE, str(tmp_path), str(ranks), config.model_dump_json()],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        anonymous, resident = map(int, done.stdout.split())
        return anonymous, resident

    for ranks in (2, 4):
        anonymous, resident = measure(ranks)
        assert 0.9 < anonymous / (whole / ranks) < 1.2
        assert resident < 1.3 * whole / ranks  # the mapped files are let go
    assert measure(0)[1] > 0.9 * whole  # one process maps them all
