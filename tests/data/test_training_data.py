from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from minigpt.core.artifact import open_artifact
from minigpt.core.config import from_mapping
from minigpt.core.errors import ArtifactError, DataError
from minigpt.data.config import MixtureConfig
from minigpt.data.loader import BatchLoader
from minigpt.data.training_data import open_training_data

if TYPE_CHECKING:
    from tests.data.conftest import MakeDataset


@pytest.fixture(scope="module")
def paths(make_dataset: MakeDataset) -> list[Path]:
    return [
        make_dataset([300] * 9, seed=1, val_fraction=0.3),
        make_dataset([500] * 9, seed=2, val_fraction=0.3),
    ]


def mixture(*paths: Path) -> MixtureConfig:
    sources = [{"name": f"s{i}", "dataset": str(path)} for i, path in enumerate(paths)]
    return from_mapping(MixtureConfig, {"mixture": sources})


def test_a_mixture_joins_its_sources(paths: list[Path]) -> None:
    first = open_artifact(paths[0])
    data = open_training_data(mixture(*paths), first)
    assert list(data.artifacts) == ["s0", "s1"]
    assert data.num_tokens == sum(part.num_tokens for part in data.train.values())
    held_out = [data.validation.document(i) for i in range(data.validation.num_documents)]
    lengths = {len(document) for document in held_out}
    assert lengths == {301, 501}  # of both, each with its end-of-text token
    loader = data.loader(batch_size=2, sequence_length=32, samples_per_step=4, seed=0)
    assert isinstance(loader, BatchLoader)
    assert set(loader.locate(0, 8).sources.tolist()) == {0, 1}
    alone = open_training_data(str(paths[0]), first)
    assert alone.fingerprint != data.fingerprint
    assert list(alone.train) == ["data"]


def test_another_tokenizer_is_refused_by_name(paths: list[Path], make_dataset: MakeDataset) -> None:
    other = make_dataset([300] * 9, seed=3, tokenizer={"vocab_size": 270})
    with pytest.raises(DataError, match=r"s1 .* has another tokenizer than s0"):
        open_training_data(mixture(paths[0], other), open_artifact(paths[0]))


def test_a_source_that_is_not_there_is_named(paths: list[Path]) -> None:
    with pytest.raises(ArtifactError, match="no artifact at /nowhere"):
        open_training_data(mixture(paths[0], Path("/nowhere")), open_artifact(paths[0]))
