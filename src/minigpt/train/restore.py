"""Putting a run back to its newest good checkpoint: at the start, and for a rollback."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from minigpt.core.errors import ArtifactError
from minigpt.core.telemetry import get_logger
from minigpt.data.skip_list import SkipList
from minigpt.model.lora import load_trained_state, trained_state
from minigpt.train.build import Build, Sources
from minigpt.train.checkpoint import TrainState, restore_rng
from minigpt.train.config import TrainConfig
from minigpt.train.context import Outputs
from minigpt.train.machine import numeric_environment
from minigpt.train.metrics import check_steps
from minigpt.train.world import World


def restore(
    config: TrainConfig, parts: Build, sources: Sources, outputs: Outputs, world: World
) -> TrainState:
    """Put the newest good checkpoint into `parts` and cut the logs back to it, on all ranks.

    Without a checkpoint begin at step 0, which `parts` must be at.
    """
    state = _load(config, parts, sources, outputs, world)
    parts.step.load_state(state.loss_scale)
    done = {"train": state.step, "validation": state.validated_step, "checkpoint": state.step}

    def keep(line: Mapping[str, Any]) -> bool:
        return line["kind"] not in done or line["step"] <= done[line["kind"]]

    outputs.metrics.rewind(keep)
    outputs.events.rewind(keep)
    for step, reason in outputs.store.corrupt.items():
        outputs.events.append({"kind": "corrupt_checkpoint", "step": step, "reason": reason})
    if world.is_first:
        check_steps(outputs.metrics.path, state.step)
    return state


def _load(
    config: TrainConfig, parts: Build, sources: Sources, outputs: Outputs, world: World
) -> TrainState:
    log = get_logger("train")
    # Samples skipped since the checkpoint come after it; the cursor is checked against the list.
    parts.loader.next_sample = 0
    run_dir = outputs.metrics.path.parent
    recipe_list = parts.loader.skip_list
    parts.loader.use_skip_list(world.from_first(lambda: SkipList.of_run(run_dir, recipe_list)))
    checkpoint = outputs.store.load_latest(trained_state(parts.model))
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
            f"{sources.train.uri} is not the dataset that this run began with",
            remedy="restore that dataset, or start a new run in another --run-dir",
        )
    if state.environment != environment and world.is_first:
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
    if world.is_first:
        where = checkpoint.artifact.uri
        log.info("resuming", step=state.step, steps=config.steps, checkpoint=where)
    return state
