"""What the training loop is given besides config, state and parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from minigpt.train.checkpoint import CheckpointStore, TrainState
from minigpt.train.display import Display
from minigpt.train.mesh import Mesh
from minigpt.train.metrics import MetricsLog
from minigpt.train.progress import Progress
from minigpt.train.sessions import History
from minigpt.train.trackers import BackgroundTracker
from minigpt.train.world import World


@dataclass(frozen=True)
class Speedometer:
    """What turns seconds into MFU."""

    flops_per_token: float
    peak_flops: float
    """Of all ranks together."""

    def mfu(self, tokens_per_second: float) -> float:
        """Return the share of the measured peak that the model's own FLOPs reach."""
        return self.flops_per_token * tokens_per_second / self.peak_flops


@dataclass(frozen=True)
class Outputs:
    """Where the loop's results go; on all ranks but the first, nowhere."""

    store: CheckpointStore
    metrics: MetricsLog
    """A line a training step."""
    events: MetricsLog
    """Validations, checkpoints and everything out of the ordinary."""
    tracker: BackgroundTracker
    display: Display


@dataclass(frozen=True)
class Member:
    """This process as one of the run's ranks."""

    run_dir: Path
    world: World
    mesh: Mesh
    progress: Progress
    history: History
    restore: Callable[[], TrainState]
    """Puts the newest good checkpoint into the parts and cuts the logs back to it."""
