"""Heads learn what the frozen model will say; the run resumes exactly and knows its model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.runs import dying_clock, exact_result
from torch import Tensor

from minigpt.core.artifact import Artifact, open_artifact
from minigpt.core.config import from_mapping
from minigpt.core.errors import ArtifactError
from minigpt.data.loader import Batch
from minigpt.model.attention import CausalAttention
from minigpt.model.decoder import Decoder
from minigpt.model.draft_heads import add_draft_heads, draft_heads_of, load_draft_heads
from minigpt.model.weights import load_model
from minigpt.train.config import TrainConfig
from minigpt.train.draft_heads import DraftHeadsObjective
from minigpt.train.export_weights import export_weights
from minigpt.train.metrics import read_metrics
from minigpt.train.run import train

ConfigFactory = Callable[..., TrainConfig]


@pytest.fixture
def make_heads_config(make_config: ConfigFactory, tiny_model: Path) -> ConfigFactory:
    """Build a config of a short run of heads for the tiny model."""

    def make(**changes: Any) -> TrainConfig:
        tree: dict[str, Any] = {
            "initialize_from": str(tiny_model),
            "model": {},
            "objective": {"kind": "draft-heads", "depth": 2},
            "validation": {"every": 6, "tokens": 2048, "sample_tokens": 0},
        }
        return make_config(**tree | changes)

    return make


class Plain:
    """A `Compute` on one device in the weights' precision."""

    chunk_tokens = 7
    dtype = torch.float64
    sharers = 1

    def hidden(self, model: Decoder, batch: Batch) -> Tensor:
        hidden: Tensor = model(batch.tokens, batch.positions, CausalAttention())
        return hidden


def test_the_loss_is_the_mean_divergence_over_the_depths(small_decoder: Decoder) -> None:
    """Written out token by token; documents and masked targets are kept apart."""
    model = small_decoder
    generator = torch.Generator().manual_seed(0)
    add_draft_heads(model, model.config, generator)
    heads = draft_heads_of(model).double()
    length, depth = 9, 3
    tokens = torch.randint(0, model.config.vocab_size, (2, length + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[0, 4] = -1
    documents = torch.zeros(2, length, dtype=torch.int32)
    documents[1, 6:] = 1
    positions = torch.arange(length).expand(2, -1)
    batch = Batch(tokens[:, :-1], targets, positions, documents)
    compute: Any = Plain()
    loss = DraftHeadsObjective(depth).loss_sum(model, batch, compute)
    torch.autograd.backward(loss)
    found = {name: p.grad for name, p in heads.named_parameters()}
    heads.zero_grad()

    hidden = model(batch.tokens, positions, CausalAttention()).detach()
    naive = torch.zeros((), dtype=torch.float64)
    for row in range(2):
        for place in range(length):
            state = hidden[row, place]
            for ahead in range(1, depth + 1):
                at = place + ahead
                if at >= length:
                    break
                state = heads(state, model.model.embed_tokens(batch.tokens[row, at]))
                if documents[row, at] != documents[row, place] or targets[row, at] == -1:
                    continue
                ours = (model.output_weight @ state).log_softmax(-1)
                theirs = (model.output_weight @ hidden[row, at]).log_softmax(-1)
                naive = naive + (theirs.exp() * (theirs - ours)).sum() / depth
    torch.autograd.backward(naive)
    assert float(loss.detach()) == pytest.approx(float(naive.detach()), rel=1e-10)
    for name, parameter in heads.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-8, atol=1e-10)
    assert all(p.grad is None for n, p in model.named_parameters() if "draft_heads" not in n)


def test_a_run_learns_and_resumes_to_the_last_bit(
    make_heads_config: ConfigFactory, dataset: Artifact, tiny_model: Path, tmp_path: Path
) -> None:
    config = make_heads_config()
    whole = train(config, dataset, tmp_path / "whole")
    path = tmp_path / "broken"
    for steps in (5, 9):
        with pytest.raises(KeyboardInterrupt):
            train(
                config, dataset, tmp_path / "broken", clock=dying_clock(tmp_path / "broken", steps)
            )
    broken = train(config, dataset, tmp_path / "broken")
    assert exact_result(path) == exact_result(tmp_path / "whole")
    assert train(config, dataset, tmp_path / "whole").id == whole.id, "a finished run opens"

    lines = list(read_metrics(tmp_path / "whole" / "metrics.jsonl"))
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]
    mean = (lines[-1]["kl_1"] + lines[-1]["kl_2"]) / 2
    assert mean == pytest.approx(lines[-1]["loss"], rel=1e-4)

    base = open_artifact(tiny_model)
    for result in (whole, broken):
        assert result.manifest.kind == "draft-heads"
        assert base.id in {parent.id for parent in result.manifest.parents}
    heads = load_draft_heads(whole.path, base.id, dtype=torch.float32, device="cpu")
    again = load_draft_heads(broken.path, base.id, dtype=torch.float32, device="cpu")
    for ours, theirs in zip(heads.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert heads.fuse.in_features == 2 * load_model(tiny_model).config.hidden_size
    assert not (tmp_path / "whole" / "model").exists()


def test_a_checkpoint_holds_the_heads_alone(
    make_heads_config: ConfigFactory, dataset: Artifact, tmp_path: Path
) -> None:
    train(make_heads_config(steps=4), dataset, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000004"
    names = [n for n in open_artifact(checkpoint).manifest.tensors if n.startswith("model/")]
    assert names and all("draft_heads." in name for name in names)
    with pytest.raises(ArtifactError, match="draft heads alone"):
        export_weights(checkpoint, tmp_path / "exported")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"initialize_from": None}, "set initialize_from"),
        ({"lora": {"rank": 4}}, r"draft-heads with lora\.rank = 4"),
        ({"mesh": {"dp": 2}}, "draft-heads with a mesh of 2 processes"),
        ({"objective": {"kind": "pretrain", "depth": 2}}, "is for kind draft-heads"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], message: str) -> None:
    tree: dict[str, Any] = {
        "data": "somewhere",
        "initialize_from": "model",
        "objective": {"kind": "draft-heads"},
    }
    with pytest.raises(Exception, match=message):
        from_mapping(TrainConfig, tree | changes)
