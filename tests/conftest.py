"""Fixtures that several packages' tests share."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def _minigpt_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the tests out of the user's own ~/.minigpt."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIGPT_HOME", str(tmp_path_factory.mktemp("home")))
        yield


def english(rng: random.Random, sentences: int) -> str:
    """Make up simple English: learnable, and no two texts alike."""
    nouns = "river town letter garden window stranger horse winter kitchen song bridge"
    verbs = "followed remembered painted carried forgot watched crossed repaired sold"
    adjectives = "old quiet yellow broken distant patient narrow cheerful heavy small"
    joints = ["because", "while", "although", "and then", "before", "until"]

    def noun() -> str:
        return f"{rng.choice(adjectives.split())} {rng.choice(nouns.split())}"

    def clause() -> str:
        return f"the {noun()} {rng.choice(verbs.split())} a {noun()}"

    lines = [f"{clause()} {rng.choice(joints)} {clause()}.".capitalize() for _ in range(sentences)]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset artifact of made-up English in bytes: about 240 KB in 300 documents."""
    from minigpt.data.config import DataConfig
    from minigpt.data.prepare import prepare

    directory = tmp_path_factory.mktemp("dataset")
    rng = random.Random(0)
    (directory / "text").mkdir()
    for number in range(300):
        text = english(rng, sentences=rng.randint(2, 16))
        (directory / "text" / f"{number:03}.txt").write_text(text, encoding="utf-8")
    config = DataConfig.model_validate(
        {
            "source": {"kind": "text", "paths": [str(directory / "text")]},
            "tokenizer": {"kind": "bytes"},
            "val_fraction": 0.1,
        }
    )
    return prepare(config, directory / "dataset").path


@pytest.fixture(scope="session")
def example_datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Datasets of made-up conversations ("chat") and pairs ("preference") in bytes.

    About 300 prompts; an answer to a prompt repeats its first noun, a rejected one does not.
    """
    import json

    from minigpt.data.config import DataConfig
    from minigpt.data.prepare import prepare

    directory = tmp_path_factory.mktemp("examples")
    rng = random.Random(0)
    records = []
    for _ in range(300):
        prompt = english(rng, sentences=1).split(" because ")[0].strip()[:40]
        noun = prompt.split()[2] if len(prompt.split()) > 2 else prompt
        answer, other = f"I saw the {noun}.", f"It is {english(rng, sentences=1)[:20]}"
        records.append(
            {"prompt": prompt, "completion": answer, "chosen": answer, "rejected": other}
        )
    (directory / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    found = {}
    for kind in ("chat", "preference"):
        tree = {
            "source": {"kind": kind, "paths": [str(directory / "records.jsonl")]},
            "tokenizer": {"kind": "bytes"},
            "chat": {"max_tokens": 96},
            "val_fraction": 0.15,
        }
        found[kind] = prepare(DataConfig.model_validate(tree), directory / kind).path
    return found


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model artifact: 2 layers in Qwen3's style, random fp32 weights, byte tokenizer.

    The vocabulary is 257: a token per byte, 256 ends a text. Untied, and with an output
    projection large enough that greedy choices are clear and depend on the whole context.
    """
    import torch

    from minigpt.core.artifact import create_artifact
    from minigpt.data.tokenizer_build import bytes_tokenizer
    from minigpt.model.config import ModelConfig
    from minigpt.model.decoder import Decoder
    from minigpt.model.weights import save_model

    tokenizer = bytes_tokenizer()
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        num_layers=2,
        hidden_size=64,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=128,
        context_length=512,
        tie_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    model = Decoder(config)
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.output_weight.mul_(20)
    directory = tmp_path_factory.mktemp("tiny")
    tokenizer.copy_to(directory)
    with create_artifact(directory / "model", kind="model") as draft:
        save_model(draft.path, model, config, tokenizer_dir=directory)
    return directory / "model"
