"""Loading what is on disk: the fixture artifact, its int8 form, and what must be refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minigpt.api.requests import Request, SamplingParams
from minigpt.core.errors import MinigptError
from minigpt.data.tokenizer import Tokenizer
from minigpt.engine.config import EngineConfig
from minigpt.engine.engine import Engine
from minigpt.engine.threads import PROCESS_ENVIRONMENT
from minigpt.model.attention import CausalAttention
from minigpt.model.linear import quantize_module
from minigpt.model.weights import load_model, save_model


def _config(**changes: Any) -> EngineConfig:
    return EngineConfig.model_validate({"device": "cpu", "threads": 1} | changes)


def _ask(path: Path, dtype: str, run: Callable[..., Any]) -> Any:
    engine = Engine.load(path, _config(dtype=dtype))
    prompt = Tokenizer.load(path).encode("def f(x):", bos=True)
    sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=1)
    return run(engine, Request(id="r", prompt_token_ids=prompt, sampling=sampling))["r", 0]


@torch.inference_mode()
def _logprob_error(path: Path, dtype: str, answer: Any) -> float:
    """Return the largest difference between reported and fully recomputed log-probabilities."""
    model = load_model(path, dtype=dtype).model
    prompt = Tokenizer.load(path).encode("def f(x):", bos=True)
    tokens = torch.tensor([prompt + answer.token_ids])
    positions = torch.arange(tokens.shape[1])[None]
    logits = model.logits(model(tokens, positions, CausalAttention())).float()
    expected = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    reported = torch.tensor([d.logprobs[0].logprob for d in answer.deltas])
    recomputed = expected.gather(-1, torch.tensor(answer.token_ids)[:, None])[:, 0]
    return (reported - recomputed).abs().max().item()


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-4), ("bfloat16", 0.5)])
def test_artifact_is_served(
    tiny_model: Path, run: Callable[..., Any], dtype: str, limit: float
) -> None:
    answer = _ask(tiny_model, dtype, run)
    assert len(answer.token_ids) == 12
    assert answer.text == Tokenizer.load(tiny_model).decode(answer.token_ids)
    assert _logprob_error(tiny_model, dtype, answer) < limit


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-4), ("bfloat16", 0.5)])
@pytest.mark.parametrize("group_size", [None, 32])
def test_a_quantized_model_is_served_as_it_is(
    tiny_model: Path,
    tmp_path: Path,
    run: Callable[..., Any],
    dtype: str,
    limit: float,
    group_size: int | None,
) -> None:
    loaded = load_model(tiny_model)
    quantize_module(loaded.model, group_size)
    save_model(tmp_path / "small", loaded.model, loaded.config, tokenizer_dir=tiny_model)
    answer = _ask(tmp_path / "small", dtype, run)
    assert _logprob_error(tmp_path / "small", dtype, answer) < limit


def test_ready_names_the_artifact(tiny_model: Path) -> None:
    ready = Engine.load(tiny_model, _config()).ready()
    assert ready.model_id == json.loads((tiny_model / "manifest.json").read_text())["id"]
    assert ready.load_seconds > 0


def test_a_tokenizer_that_does_not_fit_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(tiny_model, bad)
    (bad / "manifest.json").unlink()
    tokenizer = json.loads((bad / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": 300, "content": "<x>"})
    tokenizer["model"]["vocab"] |= {f"x{i}": i for i in range(257, 300)}
    (bad / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(MinigptError, match="301"):
        Engine.load(bad, _config())


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MinigptError):
        Engine.load(tmp_path, _config())


def test_scheduling_half_and_config_import_no_torch() -> None:
    modules = (
        "blocks",
        "config",
        "cost_model",
        "detokenizer",
        "fairness",
        "prefix_cache",
        "resolve",
        "scheduler",
        "sequence",
        "threads",
        "validate",
    )
    imports = "; ".join(f"import minigpt.engine.{name}" for name in modules)
    check = f"import sys; {imports}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)


def test_the_process_environment_reaches_openmp() -> None:
    """Its variable is one that the OpenMP runtime under this torch reads at load."""
    check = "import torch; torch.set_num_threads(2); torch.ones(1 << 20).exp()"
    environment = os.environ | PROCESS_ENVIRONMENT | {"OMP_DISPLAY_ENV": "verbose"}
    done = subprocess.run(
        [sys.executable, "-c", check], env=environment, check=True, capture_output=True, text=True
    )
    if "OPENMP DISPLAY ENVIRONMENT" not in done.stderr or "GOMP" not in done.stderr:
        pytest.skip("torch is built with another OpenMP than GNU's")
    assert f"GOMP_SPINCOUNT = '{PROCESS_ENVIRONMENT['GOMP_SPINCOUNT']}'" in done.stderr
