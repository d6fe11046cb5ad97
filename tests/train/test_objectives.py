"""Whole runs of each objective: they learn, resume to the last bit, and know their origins."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.train.rank_processes import launch
from tests.train.runs import dying_clock

from minigpt.core.artifact import Artifact, open_artifact
from minigpt.core.config import from_mapping
from minigpt.core.errors import ArtifactError, ConfigError, ModelError
from minigpt.data.shards import TokenDataset
from minigpt.data.tokenizer import Tokenizer
from minigpt.data.tokenizer_build import train_bpe
from minigpt.model.weights import load_model, save_model
from minigpt.train.config import MeshConfig, TrainConfig, ValidationConfig
from minigpt.train.export_weights import export_weights
from minigpt.train.metrics import read_metrics
from minigpt.train.run import read_final, train
from minigpt.train.validation import Validator, answer_spans, choose_examples

ConfigFactory = Callable[..., TrainConfig]
EXACT = ("steps", "losses", "validation", "weights_sha256")


@pytest.fixture(scope="module")
def datasets(example_datasets: dict[str, Path], tiny_dataset: Path) -> dict[str, Artifact]:
    paths = example_datasets | {"text": tiny_dataset}
    return {kind: open_artifact(path, kind="dataset") for kind, path in paths.items()}


@pytest.fixture
def make_tuning(make_config: ConfigFactory, tiny_model: Path) -> ConfigFactory:
    """Build a config of a short run from the tiny model's weights."""

    def make(kind: str, **changes: Any) -> TrainConfig:
        tree: dict[str, Any] = {
            "initialize_from": str(tiny_model),
            "model": {},
            "objective": {"kind": kind},
            "batch": {"sequence_length": 96, "tokens_per_step": 768, "micro_batch_size": 4},
            "optimizer": {"kind": "adamw", "lr": 3e-3},
            "steps": 9,
            "validation": {"every": 3, "tokens": 4096, "sample_tokens": 4},
            "checkpoint": {"every": 3},
        }
        return make_config(**tree | changes)

    return make


def exact(run_dir: Path) -> dict[str, Any]:
    final = read_final(run_dir)
    lines = list(read_metrics(run_dir / "metrics.jsonl"))
    result = {key: final[key] for key in EXACT}
    result["lines"] = [
        {k: v for k, v in line.items() if k in ("loss_hex", "grad_norm", "margin", "accuracy")}
        for line in lines
    ]
    return result


def broken_twice(config: TrainConfig, dataset: Artifact, run_dir: Path) -> None:
    """Run to the end, having died within step 5 and within step 8."""
    for steps in (4, 7):
        with pytest.raises(KeyboardInterrupt):
            train(config, dataset, run_dir, clock=dying_clock(run_dir, steps))
    train(config, dataset, run_dir)


def validations(run_dir: Path) -> list[dict[str, Any]]:
    return [x for x in read_metrics(run_dir / "events.jsonl") if x["kind"] == "validation"]


@pytest.mark.parametrize(
    ("kind", "content", "changes"),
    [
        ("sft", "chat", {}),
        ("sft", "chat", {"lora": {"rank": 4, "dropout": 0.1}}),
        ("dpo", "preference", {}),
        ("dpo", "preference", {"lora": {"rank": 4}}),
        ("distill", "text", {}),
    ],
    ids=["sft", "sft-lora", "dpo", "dpo-lora", "distill"],
)
def test_a_run_that_died_twice_is_the_same_to_the_last_bit(
    make_tuning: ConfigFactory,
    datasets: dict[str, Artifact],
    tiny_model: Path,
    tmp_path: Path,
    kind: str,
    content: str,
    changes: dict[str, Any],
) -> None:
    if kind == "distill":
        changes = {"objective": {"kind": "distill", "teacher": str(tiny_model)}}
        changes |= {"initialize_from": None, "model": {"hidden_size": 32, "head_dim": 16}}
    config = make_tuning(kind, **changes)
    model = train(config, datasets[content], tmp_path / "whole")
    broken_twice(config, datasets[content], tmp_path / "broken")
    assert exact(tmp_path / "broken") == exact(tmp_path / "whole")
    found = validations(tmp_path / "whole")
    assert found[-1]["loss"] < found[0]["loss"]
    origins = {parent.id for parent in model.manifest.parents if parent.kind == "model"}
    assert open_artifact(tiny_model).id in origins
    if kind == "dpo":
        assert {"accuracy", "margin"} <= found[0].keys()
        assert found[-1]["margin"] > found[0]["margin"]


def _train_rank(rank: int, world: int, config: TrainConfig, dataset: str, run_dir: str) -> None:
    places = {"RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    os.environ.update({name: str(value) for name, value in places.items()})
    train(config, open_artifact(dataset), Path(run_dir))


def test_adapters_of_a_pipeline_are_saved_whole_and_merged(
    make_tuning: ConfigFactory, datasets: dict[str, Artifact], tmp_path: Path
) -> None:
    dataset = datasets["chat"]
    config = make_tuning("sft", lora={"rank": 4}, steps=3)
    train(config, dataset, tmp_path / "one")
    mesh = MeshConfig(pp=2)
    arguments = {"config": config.replace(mesh=mesh), "dataset": str(dataset.path)}
    launch(_train_rank, 2, run_dir=str(tmp_path / "two"), **arguments)
    one, two = read_final(tmp_path / "one"), read_final(tmp_path / "two")
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert two["trained_parameters"] == one["trained_parameters"]
    exported = export_weights(tmp_path / "two/checkpoints/step-00000003", tmp_path / "exported")
    model = open_artifact(tmp_path / "two/model")
    assert exported.manifest.files["model.safetensors"] == model.manifest.files["model.safetensors"]


def test_adapters_are_what_is_saved_and_merged_is_what_is_left(
    make_tuning: ConfigFactory, datasets: dict[str, Artifact], tiny_model: Path, tmp_path: Path
) -> None:
    config = make_tuning("sft", lora={"rank": 4})
    model = train(config, datasets["chat"], tmp_path / "run")
    checkpoint = load_file(tmp_path / "run/checkpoints/step-00000009/model.safetensors")
    assert len(checkpoint) == 2 * 2 * 7 and all(".lora_" in name for name in checkpoint)
    optimizer = load_file(tmp_path / "run/checkpoints/step-00000009/optimizer.safetensors")
    assert {name.rpartition("/")[0] for name in optimizer} == set(checkpoint)
    base, merged = load_model(tiny_model), load_model(model.path)
    for name, tensor in merged.model.state_dict().items():
        is_target = name.endswith("_proj.weight")
        assert torch.equal(tensor, base.model.state_dict()[name]) != is_target
    kinds = {parent.kind for parent in model.manifest.parents}
    assert kinds == {"dataset", "model", "adapter", "checkpoint"}
    exported = export_weights(tmp_path / "run/checkpoints/step-00000009", tmp_path / "exported")
    assert exported.manifest.files["model.safetensors"] == model.manifest.files["model.safetensors"]
    assert open_artifact(tiny_model).id in {parent.id for parent in exported.manifest.parents}
    wrong, nowhere = tmp_path / "run/model", tmp_path / "none"
    for place, message in ((wrong, "adapters for another model"), (nowhere, "can't be read")):
        with pytest.raises((ArtifactError, ModelError), match=message):
            export_weights(
                tmp_path / "run/checkpoints/step-00000009", tmp_path / "again", base=str(place)
            )
    final = read_final(tmp_path / "run")
    assert final["trained_parameters"] == sum(t.numel() for t in checkpoint.values())
    dataset = TokenDataset.open(datasets["chat"].path, "val")
    validator = Validator(
        dataset,
        Tokenizer.load(dataset.tokenizer_dir),
        config.validation,
        context_length=96,
        dtype="float32",
        seed=0,
    )
    score = validator.score(merged.model)
    assert score is not None
    assert score.bits_per_byte == pytest.approx(final["bits_per_byte"], rel=1e-5)


def test_validation_scores_what_the_assistant_says(
    datasets: dict[str, Artifact], tiny_model: Path
) -> None:
    dataset = TokenDataset.open(datasets["chat"].path, "val")
    model = load_model(tiny_model).model
    with torch.no_grad():
        model.output_weight.zero_()
    validator = Validator(
        dataset,
        Tokenizer.load(dataset.tokenizer_dir),
        ValidationConfig(tokens=3000),
        context_length=96,
        dtype="float32",
        seed=0,
    )
    chosen = choose_examples(dataset, 3000, seed=0)
    spans = [span for document in chosen for span in answer_spans(dataset, document)]
    targets = sum(len(span.tokens) - span.first_target for span in spans)
    score = validator.score(model)
    assert score is not None and score.tokens == targets
    assert score.bytes == targets - len(chosen)  # the ends of the turns stand for no text
    assert score.loss == pytest.approx(torch.tensor(257.0).log().item(), rel=1e-6)
    text = bytes(spans[0].tokens[spans[0].first_target : -1].astype("uint8")).decode()
    assert text.endswith(".")


def test_data_that_is_not_the_objectives_is_refused(
    make_tuning: ConfigFactory, datasets: dict[str, Artifact], tmp_path: Path
) -> None:
    for kind, content, message in (
        ("sft", "text", "needs a dataset of chat, .* is one of text .*pretrain or distill"),
        ("pretrain", "chat", "needs a dataset of text, .* is one of chat .*sft or distill"),
        ("dpo", "chat", "needs a dataset of preference"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(make_tuning(kind), datasets[content], tmp_path / "run")
    with pytest.raises(
        ConfigError, match=r"longest example has \d\d tokens, the model's context 64"
    ):
        changes = {"initialize_from": None, "model": {"hidden_size": 32, "context_length": 64}}
        train(make_tuning("sft", **changes), datasets["chat"], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_with_another_tokenizer_is_refused(
    make_tuning: ConfigFactory, datasets: dict[str, Artifact], tiny_model: Path, tmp_path: Path
) -> None:
    """Of equal size, so that nothing but a look at the vocabulary tells."""
    other = train_bpe(iter([["abab"]]), vocab_size=257)
    other.copy_to(tmp_path)
    loaded = load_model(tiny_model)
    save_model(tmp_path / "other", loaded.model, loaded.config, tmp_path)
    teaching = {"kind": "distill", "teacher": str(tmp_path / "other")}
    for config in (
        make_tuning("sft", initialize_from=str(tmp_path / "other")),
        make_tuning("distill", objective=teaching),
    ):
        content = "chat" if config.objective.kind == "sft" else "text"
        with pytest.raises(ModelError, match="is not the dataset's"):
            train(config, datasets[content], tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": {"kind": "dpo"}, "initialize_from": None}, "dpo tunes given weights"),
        ({"lora": {"rank": 4}, "initialize_from": None}, r"lora\.rank = 4 tunes given weights"),
        ({"objective": {"kind": "distill"}}, "teacher is required"),
        ({"objective": {"kind": "sft", "beta": 0.5}}, "beta = 0.5 is for kind dpo, not sft"),
        ({"objective": {"teacher": "x"}}, "teacher = x is for kind distill, not pretrain"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    make_tuning: ConfigFactory, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_tuning("sft", **changes)


def test_what_is_derived_for_tuning(
    make_tuning: ConfigFactory, datasets: dict[str, Artifact], tmp_path: Path
) -> None:
    auto = {"steps": "auto", "batch": {}, "optimizer": {}}
    rates = {}
    for name, kind, content, changes in (
        ("sft", "sft", "chat", {}),
        ("lora", "sft", "chat", {"lora": {"rank": 2}}),
        ("dpo", "dpo", "preference", {}),
    ):
        config = make_tuning(kind, **auto | changes)
        train(config, datasets[content], tmp_path / name)
        text = (tmp_path / name / "config.yaml").read_text()
        resolved = from_mapping(TrainConfig, _yaml(text))
        rates[name] = resolved.optimizer.lr
        tokens, row = resolved.batch.tokens_per_step, resolved.batch.sequence_length
        assert isinstance(tokens, int) and isinstance(row, int) and isinstance(resolved.steps, int)
        dataset = TokenDataset.open(datasets[content].path, "train")
        seen = resolved.steps * tokens / row
        if kind == "dpo":
            assert isinstance(resolved.batch.micro_batch_size, int)
            assert resolved.batch.micro_batch_size % 2 == 0
            assert seen == pytest.approx(dataset.num_documents, abs=tokens / row)
        else:
            assert seen == pytest.approx(3 * dataset.num_tokens / row, abs=tokens / row)
    assert rates["lora"] == pytest.approx(10 * float(rates["sft"]), rel=0.05)
    assert float(rates["dpo"]) < float(rates["sft"])


def _yaml(text: str) -> dict[str, Any]:
    import yaml

    tree: dict[str, Any] = yaml.safe_load(text)
    return tree
