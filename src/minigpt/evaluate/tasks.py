"""lm-eval tasks over local files; nothing is downloaded.

A task file is lm-eval's YAML; its `data_files` are relative to the file itself. lm-eval (the
extra `tasks`) is imported only here.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import NormalDist
from typing import Any

from minigpt.core.errors import ConfigError, DataError
from minigpt.data.tokenizer import Tokenizer
from minigpt.evaluate.config import EvaluateConfig
from minigpt.evaluate.report import Measured
from minigpt.model.weights import LoadedModel

_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
_BOOTSTRAP = 1000
"""Resamples for the scores that have no closed form of a standard error."""


def check_task_files(tasks: tuple[str, ...]) -> None:
    """Refuse task files that are not there, and tasks where lm-eval is not installed.

    Raises:
        ConfigError: See above; the message names the file or the extra to install.
    """
    for task in tasks:
        if not Path(task).is_file():
            raise ConfigError(f"no task file at {task}", remedy="check the path")
    if tasks:
        _import_lm_eval()


def run_tasks(
    loaded: LoadedModel, tokenizer: Tokenizer, config: EvaluateConfig, context_length: int
) -> dict[str, Measured]:
    """Run `config.tasks` and return each score as the metric `task/<task>/<metric>`.

    Raises:
        ConfigError: lm-eval is not installed, or a file is not there.
        DataError: A task file or its data are malformed.
    """
    check_task_files(config.tasks)
    from minigpt.evaluate.harness import HarnessModel

    model = HarnessModel(
        loaded.model,
        tokenizer,
        context_length=context_length,
        batch_tokens=config.batch_tokens,
        seed=config.seed,
    )
    metrics: dict[str, Measured] = {}
    for task in config.tasks:
        try:
            with _quiet():
                results = _run(model, Path(task).absolute(), config)
        except Exception as error:  # lm-eval and datasets raise whatever they meet
            line = " ".join(str(error).split())[:200]
            raise DataError(f"task file {task}: {type(error).__name__}: {line}") from error
        for name, scores in results["results"].items():
            metrics |= _measured(name, scores, config.confidence)
    return metrics


def _run(model: Any, path: Path, config: EvaluateConfig) -> dict[str, Any]:
    """Load and run one task file."""
    lm_eval = _import_lm_eval()
    # A task's own data files are relative to it.
    with contextlib.chdir(path.parent):
        tasks = lm_eval.tasks.TaskManager(include_defaults=False).load([str(path)])
    for task in tasks["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=config.seed)
    results: dict[str, Any] = lm_eval.evaluator.evaluate(
        model,
        tasks,
        limit=config.task_limit,
        bootstrap_iters=_BOOTSTRAP,
        log_samples=False,
    )
    return results


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval's own progress bars off a standard error that is no terminal."""
    if sys.stderr.isatty():
        yield
    else:
        with contextlib.redirect_stderr(io.StringIO()):
            yield


def _measured(task: str, scores: dict[str, Any], confidence: float) -> dict[str, Measured]:
    """Turn lm-eval's `{"acc,none": ..., "acc_stderr,none": ...}` into metrics."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    metrics = {}
    for key, value in scores.items():
        metric, _, filtered = key.partition(",")
        if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = scores.get(f"{metric}_stderr,{filtered}")
        name = f"task/{task}/{metric}" + ("" if filtered == "none" else f"@{filtered}")
        if isinstance(error, int | float):
            metrics[name] = Measured(estimate=value, low=value - z * error, high=value + z * error)
        else:
            metrics[name] = Measured(estimate=value)
    return metrics


def _import_lm_eval() -> Any:
    """Import lm-eval, offline and quiet."""
    for name in _OFFLINE:
        os.environ.setdefault(name, "1")
    try:
        import lm_eval
        import lm_eval.evaluator
        import lm_eval.tasks
    except ImportError as error:
        raise ConfigError(
            f"tasks need lm-eval, which is not installed ({error})",
            remedy="pip install 'minigpt[tasks]'",
        ) from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return lm_eval
