"""Several adapters in one batch, loaded and dropped while sequences run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tests.engine.swapping import Answers, config, fresh, make_adapter, other_model, request

from minigpt.api.requests import SamplingParams
from minigpt.compress.config import CompressConfig
from minigpt.compress.quantize import quantize
from minigpt.core.artifact import create_artifact, open_artifact
from minigpt.core.errors import ArtifactError, MinigptError, RequestError
from minigpt.engine.adapters import AdaptedLinear
from minigpt.engine.engine import Engine
from minigpt.engine.llm import LLM
from minigpt.engine.runner import ModelRunner
from minigpt.model.lora import load_adapter, merged_state
from minigpt.model.weights import load_model, save_model

PROMPT = "The quiet town remembered"
TARGETS = {
    "attention": ("q_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "one": ("k_proj",),
}


@pytest.fixture(scope="module")
def adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: make_adapter(tiny_model, root / name, seed, *targets)
        for seed, (name, targets) in enumerate(TARGETS.items())
    }


@pytest.fixture(scope="module")
def merged(
    tiny_model: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str | None, list[int]]:
    """What plain models with each adapter merged into them answer."""
    root = tmp_path_factory.mktemp("merged")
    found: dict[str | None, list[int]] = {None: fresh(tiny_model, {"p": PROMPT})["p"]}
    for name, path in adapters.items():
        loaded = load_model(tiny_model)
        load_adapter(path).apply(loaded.model)
        save_model(root / name, merged_state(loaded.model), loaded.config, tokenizer_dir=tiny_model)
        found[name] = fresh(root / name, {"p": PROMPT})["p"]
    assert len({tuple(tokens) for tokens in found.values()}) == 4, "the adapters change nothing"
    return found


def test_a_mixed_batch_answers_as_merged_models_do(
    tiny_model: Path, adapters: dict[str, Path], merged: dict[str | None, list[int]]
) -> None:
    engine = Engine.load(tiny_model, config(max_num_seqs=16, max_batched_tokens=64))
    found = Answers(engine)
    for name, path in adapters.items():
        assert engine.load_adapter(name, path).adapters[name]
    names: list[str | None] = [None, *adapters]
    for turn in range(3):  # the second and third find prefixes in the cache, each its own
        for each in names:
            engine.add(request(f"{each}-{turn}", PROMPT, adapter=each))
        found.step()
    found.finish()
    assert engine.stats().prefix_cache_hits > 0
    for turn in range(3):
        for each in names:
            assert found.tokens[f"{each}-{turn}"] == merged[each], (each, turn)
    digest = engine.ready().adapters["one"]
    assert found.weights["one-0"] == f"{engine.ready().model_id}+{digest}"


def test_an_adapter_that_is_dropped_while_it_runs_finishes(
    tiny_model: Path, adapters: dict[str, Path], merged: dict[str | None, list[int]]
) -> None:
    engine = Engine.load(tiny_model, config())
    found = Answers(engine)
    engine.load_adapter("a", adapters["attention"])
    engine.add(request("first", PROMPT, adapter="a"))
    found.until(lambda: len(found.tokens.get("first", [])) == 3)
    engine.unload_adapter("a")
    with pytest.raises(RequestError, match="'a' is not loaded") as refused:
        engine.add(request("second", PROMPT, adapter="a"))
    assert refused.value.status == 404
    with pytest.raises(RequestError, match="'a' is not loaded"):
        engine.unload_adapter("a")
    engine.load_adapter("a", adapters["mlp"])  # the same name, another adapter
    engine.add(request("third", PROMPT, adapter="a"))
    found.finish()
    assert found.tokens["first"] == merged["attention"]
    assert found.tokens["third"] == merged["mlp"]
    with pytest.raises(RequestError, match="an adapter 'a' is loaded"):
        engine.load_adapter("a", adapters["one"])
    engine.unload_adapter("a")
    runner = engine._weights.runner
    assert isinstance(runner, ModelRunner)
    adapted = [m for m in runner._model.modules() if isinstance(m, AdaptedLinear)]
    assert adapted and not any(module.low_rank for module in adapted), "matrices are left"


def test_adapters_stay_with_the_weights_that_they_were_loaded_onto(
    tiny_model: Path,
    adapters: dict[str, Path],
    merged: dict[str | None, list[int]],
    tmp_path: Path,
) -> None:
    other = other_model(tiny_model, tmp_path / "other", seed=1)
    engine = Engine.load(tiny_model, config())
    found = Answers(engine)
    engine.load_adapter("a", adapters["attention"])
    engine.add(request("before", PROMPT, adapter="a"))
    found.step()
    found.until(engine.swap(other).done)
    assert engine.ready().adapters == {}
    with pytest.raises(RequestError, match="is not loaded"):
        engine.add(request("after", PROMPT, adapter="a"))
    assert found.finish()["before"] == merged["attention"]


def test_integer_bases_and_bfloat16_serve_adapters(
    tiny_model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    int8 = quantize(tiny_model, tmp_path / "int8", CompressConfig()).path
    int4 = quantize(tiny_model, tmp_path / "int4", CompressConfig(method="int4")).path
    for path, dtype in ((int8, "float32"), (int4, "float32"), (tiny_model, "bfloat16")):
        engine = Engine.load(path, config(dtype=dtype, adapters=True))
        engine.load_adapter("mlp", adapters["mlp"])
        found = Answers(engine)
        engine.add(request("with", PROMPT, adapter="mlp"))
        engine.add(request("without", PROMPT))
        found.finish()
        assert found.tokens["with"] != found.tokens["without"]
        assert found.tokens["without"] == Answers.finish(_alone(path, dtype))["p"]


def _alone(path: Path, dtype: str) -> Answers:
    engine = Engine.load(path, config(dtype=dtype, adapters=True))
    engine.add(request("p", PROMPT))
    return Answers(engine)


def test_bad_adapters_are_refused(
    tiny_model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    engine = Engine.load(tiny_model, config())

    def refused(path: Path, message: str) -> None:
        with pytest.raises(MinigptError, match=message):
            engine.load_adapter("a", path)
        assert engine.ready().adapters == {}

    refused(tmp_path / "nowhere", "no adapter at")
    dora = shutil.copytree(adapters["one"], tmp_path / "dora")
    tree = json.loads((dora / "adapter_config.json").read_text())
    (dora / "adapter_config.json").write_text(json.dumps(tree | {"use_dora": True}))
    refused(dora, "use_dora = True is not supported")
    wide = other_model(tiny_model, tmp_path / "wide", 1, hidden_size=32)
    refused(make_adapter(wide, tmp_path / "narrow", 0), "the adapter is not this model's")
    refused(tiny_model, "is a model artifact")


def test_adapter_artifacts_are_verified(
    tiny_model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    with create_artifact(tmp_path / "artifact", kind="adapter") as draft:
        shutil.copytree(adapters["one"], draft.path, dirs_exist_ok=True)
    with LLM(tiny_model, config()) as llm:
        llm.load_adapter("one", tmp_path / "artifact")
        params = SamplingParams(max_tokens=8, temperature=0)
        with_adapter, without = (
            llm.generate(PROMPT, params, adapter=name)[0].text for name in ("one", None)
        )
        assert with_adapter != without
        with pytest.raises(RequestError, match="'two' is not loaded"):
            llm.generate(PROMPT, params, adapter="two")
        llm.unload_adapter("one")
    assert open_artifact(tmp_path / "artifact").manifest.kind == "adapter"
    file = tmp_path / "artifact" / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with LLM(tiny_model, config()) as llm, pytest.raises(ArtifactError, match="corrupt"):
        llm.load_adapter("one", tmp_path / "artifact")
