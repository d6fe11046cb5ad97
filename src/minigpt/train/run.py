"""A training run in a directory: started, resumed or already finished.

The directory holds `config.yaml` (fully resolved), `metrics.jsonl` (a line a step), `events.jsonl`
(validations and saves), `checkpoints/`, and at the end `model/` and `final.json`. Its config never
changes: what was derived or measured at the start, the number of threads included, holds for
every resume.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minigpt.core.artifact import Artifact, open_artifact
from minigpt.core.clock import Clock, SystemClock
from minigpt.core.config import load_config, resolved_values, to_yaml
from minigpt.core.errors import ArtifactError, ConfigError, TrainingError
from minigpt.core.storage import storage_errors, write_atomic
from minigpt.core.telemetry import get_logger
from minigpt.model.config import ModelConfig
from minigpt.model.lora import load_trained_state
from minigpt.model.weights import DTYPES
from minigpt.train.build import (
    Build,
    Sources,
    build,
    fit_minutes,
    open_sources,
    resolve_for,
    use_machine,
)
from minigpt.train.checkpoint import CheckpointStore, TrainState, restore_rng
from minigpt.train.config import TrainConfig
from minigpt.train.display import make_display, show_table
from minigpt.train.finish import save_final_model, write_final
from minigpt.train.interrupt import TrainingInterruptedError
from minigpt.train.loop import Outputs, Speedometer, TrainLoop
from minigpt.train.machine import measured_peak, numeric_environment
from minigpt.train.metrics import MetricsLog, check_steps, truncate
from minigpt.train.trackers import make_tracker

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
FINAL_FILE = "final.json"
MODEL_DIRECTORY = "model"
CHECKPOINT_DIRECTORY = "checkpoints"


def train(
    config: TrainConfig, dataset: Artifact, run_dir: Path, *, clock: Clock | None = None
) -> Artifact:
    """Start the run in `run_dir`, resume the one there, or return the finished one's model.

    Args:
        config: The recipe, "auto" values and all.
        dataset: What `config.data` names, opened.
        run_dir: The run's directory; made if it is not there.
        clock: For durations.

    Returns:
        The model artifact at `run_dir/model`.

    Raises:
        ConfigError: A value can't work, or differs from that of the run in `run_dir`.
        TrainingInterruptedError: A signal stopped the run, which is saved.
        TrainingError: Loss or gradient is not finite, or another process holds the run.
        StorageError: A full disk or the like at the start or at the end.
    """
    run_dir = run_dir.absolute()
    with _lock(run_dir):
        finished = find_finished(config, run_dir)
        if finished is not None:
            return finished
        return _train(config, dataset, run_dir, clock or SystemClock())


def find_finished(config: TrainConfig, run_dir: Path) -> Artifact | None:
    """Return the model of a finished run, None where the run is not finished or not begun.

    Raises:
        ConfigError: The directory holds a run with another config.
        ArtifactError: The finished run's model is missing or corrupt.
    """
    stored = stored_config(run_dir)
    if stored is None:
        return None
    check_same(config, stored, run_dir)
    if not (run_dir / FINAL_FILE).exists():
        return None
    return open_artifact(run_dir / MODEL_DIRECTORY, kind="model")


def read_final(run_dir: Path) -> dict[str, Any]:
    """Return the content of a finished run's `final.json`."""
    with storage_errors(f"read {run_dir / FINAL_FILE}"):
        content: dict[str, Any] = json.loads((run_dir / FINAL_FILE).read_bytes())
    return content


def stored_config(run_dir: Path) -> TrainConfig | None:
    """Read the resolved config of the run in a directory, None where it holds no run."""
    path = run_dir / CONFIG_FILE
    return load_config(TrainConfig, path) if path.exists() else None


def check_same(requested: TrainConfig, stored: TrainConfig, run_dir: Path) -> None:
    """Refuse to resume under another config; "auto" stands for whatever the run has.

    Raises:
        ConfigError: Naming each key that differs.
    """
    differing = [
        f"{key} ({there!r} in the run, {wanted!r} asked for)"
        for key, wanted, there in resolved_values(requested, stored)
        if wanted != "auto" and not _is_open(requested, key)
    ]
    if differing:
        raise ConfigError(
            f"{run_dir} holds a run with another config: {', '.join(differing)}",
            remedy="use the same values to resume it, or another --run-dir for a new run",
        )


def _is_open(requested: TrainConfig, key: str) -> bool:
    """Tell whether a model key was left to the weights that the run starts from."""
    section, _, name = key.partition(".")
    given = requested.model.model_fields_set
    return (
        section == "model"
        and requested.initialize_from is not None
        and name.partition(".")[0] not in given
    )


@contextmanager
def _lock(run_dir: Path) -> Iterator[None]:
    """Hold the run directory; the system lets go of it when the process dies, however.

    A start that was refused leaves no empty directory behind.
    """
    with storage_errors(f"write {run_dir}"):
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run_dir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrainingError(
                f"another process is training in {run_dir}",
                remedy="wait for it, stop it, or use another --run-dir",
            ) from None
        yield
    finally:
        os.close(descriptor)
        with suppress(OSError):  # there is something in it
            run_dir.rmdir()


def _train(config: TrainConfig, dataset: Artifact, run_dir: Path, clock: Clock) -> Artifact:
    started = clock.monotonic()
    sources = open_sources(config, dataset)
    stored = stored_config(run_dir)
    use_machine(stored or config)
    if stored is None:
        resolved = resolve_for(config, sources)
        for warning in resolved.warnings:
            get_logger("train").warning(warning)
        fixed, model_config = resolved.config, resolved.model
    else:
        fixed, model_config = stored, resolve_for(stored, sources).model
    parts = build(fixed, model_config, sources)
    if fixed.steps == "auto":
        fixed = fit_minutes(fixed, parts, clock, started)
    if stored is None:
        show_resolved(config, fixed, model_config)
        write_atomic(run_dir / CONFIG_FILE, to_yaml(fixed).encode())
    return _run(fixed, parts, sources, run_dir, clock)


def _run(
    config: TrainConfig, parts: Build, sources: Sources, run_dir: Path, clock: Clock
) -> Artifact:
    assert isinstance(config.batch.sequence_length, int)
    store = CheckpointStore(run_dir / CHECKPOINT_DIRECTORY, keep=config.checkpoint.keep)
    state = _restore(config, parts, sources, store)
    done = {"train": state.step, "validation": state.validated_step, "checkpoint": state.step}
    for name in (METRICS_FILE, EVENTS_FILE):
        truncate(run_dir / name, lambda line: line["step"] <= done[line["kind"]])
    check_steps(run_dir / METRICS_FILE, state.step)
    speedometer = Speedometer(
        parts.model.config.flops_per_token(config.batch.sequence_length),
        measured_peak(config.device, DTYPES[config.precision]),
    )
    outputs = Outputs(
        store,
        MetricsLog(run_dir / METRICS_FILE),
        MetricsLog(run_dir / EVENTS_FILE),
        make_tracker(config, run_dir),
        make_display(),
    )
    loop = TrainLoop(config, state, parts, outputs, speedometer, sources.parents, clock)
    status = "failed"
    try:
        checkpoint = loop.run()
        outputs.metrics.flush()
        outputs.events.flush()
        state = loop.state
        artifact = save_final_model(
            run_dir / MODEL_DIRECTORY,
            parts.model,
            config,
            tokenizer_dir=sources.train.tokenizer_dir,
            metrics={"loss": state.loss, **state.validation},
            parents=[*sources.parents, checkpoint],
        )
        write_final(
            run_dir / FINAL_FILE,
            run_dir / METRICS_FILE,
            state,
            parts.model,
            artifact,
            dataset_sha256=sources.fingerprint,
        )
        status = "finished"
    except (TrainingInterruptedError, KeyboardInterrupt):
        status = "interrupted"
        raise
    finally:
        outputs.metrics.close()
        outputs.events.close()
        outputs.tracker.close(status)
    return artifact


def _restore(
    config: TrainConfig, parts: Build, sources: Sources, store: CheckpointStore
) -> TrainState:
    """Put the newest good checkpoint into `parts`; without one, begin at step 0."""
    log = get_logger("train")
    checkpoint = store.load_latest()
    environment = numeric_environment(config.device)
    if checkpoint is None:
        random.seed(config.seed)
        np.random.seed(config.seed % 2**32)
        torch.manual_seed(config.seed)
        return TrainState(
            cursor=parts.loader.state(),
            environment=environment,
            dataset_sha256=sources.fingerprint,
        )
    state = checkpoint.state
    if state.dataset_sha256 != sources.fingerprint:
        raise ArtifactError(
            f"{sources.dataset.uri} is not the dataset that this run began with",
            remedy="restore that dataset, or start a new run in another --run-dir",
        )
    if state.environment != environment:
        log.warning(
            "this machine or torch is not the one the run began on: "
            "it goes on, but not bit for bit",
            before=state.environment,
            now=environment,
        )
    load_trained_state(parts.model, checkpoint.model)
    parts.optimizer.load_state_dict(checkpoint.optimizer)
    parts.loader.load_state(state.cursor)
    restore_rng(checkpoint)
    log.info(
        "resuming", step=state.step, steps=config.steps, checkpoint=str(checkpoint.artifact.path)
    )
    return state


def show_resolved(recipe: TrainConfig, resolved: TrainConfig, model: ModelConfig) -> None:
    """Print each derived value, and the sizes that follow from them."""
    rows = [
        (key, str(value), f"from size = {recipe.size}" if key.startswith("model.") else "auto")
        for key, old, value in resolved_values(recipe, resolved)
        if old == "auto"
    ]
    counts = model.parameter_counts()
    assert isinstance(resolved.steps, int) and isinstance(resolved.batch.tokens_per_step, int)
    tokens = resolved.steps * resolved.batch.tokens_per_step
    rows += [
        ("parameters", f"{counts.total:,}", f"{counts.matmul:,} in matrix products"),
        ("tokens", f"{tokens:,}", f"{tokens / counts.matmul:.1f} per matrix parameter"),
    ]
    show_table(f"run {resolved.name}", rows)
