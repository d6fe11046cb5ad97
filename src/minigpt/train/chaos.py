"""Faults injected into real runs, and the proof that none of them changed the result.

A small run is trained once unbroken and then once for each fault, in processes started as a user
starts them. The certificate compares hashes over every step's loss and over the final weights.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from minigpt.core.artifact import Artifact, create_artifact, open_artifact
from minigpt.core.config import Config, to_yaml
from minigpt.core.errors import ConfigError, TrainingError
from minigpt.core.telemetry import get_logger
from minigpt.train.chaos_cases import CASES, Case, ChaosRun
from minigpt.train.config import TrainConfig
from minigpt.train.faults import VARIABLE, parse_faults
from minigpt.train.finish import MODEL_DIRECTORY
from minigpt.train.goodput import read_goodput
from minigpt.train.metrics import read_metrics
from minigpt.train.run import CHECKPOINT_DIRECTORY, read_final, stored_config
from minigpt.train.sessions import EVENTS_FILE

CERTIFICATE_FILE = "certificate.json"
_RUN_SECONDS = 600.0


class FaultReport(Config):
    """What one fault came to."""

    fault: str
    what: str
    """What was done to the run."""
    happened: bool
    """It struck where it should, and the run noticed."""
    finished: bool
    equal: bool
    """Losses of all steps and final weights are those of the unbroken run, bit for bit."""
    losses_sha256: str
    weights_sha256: str
    noticed: list[str]
    """Kinds of the events that the run recorded, in order, each once."""
    recovery_seconds: float | None
    """From the failure to the next finished step; None where no process failed."""
    unsaved_seconds: float | None
    """From a save that failed to the next that did not; None where none failed."""
    wall_seconds: float
    goodput: float | None
    """Share of the wall time in steps that count."""


class Certificate(Config):
    """The content of `certificate.json`."""

    ranks: int
    steps: int
    losses_sha256: str
    """Of the unbroken run."""
    weights_sha256: str
    faults: list[FaultReport]

    @property
    def holds(self) -> bool:
        """Whether every fault came about and every run finished with the unbroken run's bits."""
        return all(fault.happened and fault.equal for fault in self.faults)


def run_chaos(
    config: TrainConfig, faults: Sequence[str], directory: Path, destination: Path
) -> Artifact:
    """Train unbroken, then under each fault, and write the certificate.

    Args:
        config: A recipe; `mesh` says how many ranks. Its data must be a dataset artifact, and its
            checkpoints go below `directory`.
        faults: Names from `CASES`.
        directory: Where the runs go; made, and nothing may be there.
        destination: Where the report artifact goes.

    Returns:
        A report artifact that holds `certificate.json`; its parent is the unbroken run's model.

    Raises:
        ConfigError: An unknown fault, or one that needs what is not here.
        TrainingError: The unbroken run failed.
    """
    unknown = [name for name in faults if name not in CASES]
    if unknown:
        raise ConfigError(f"unknown fault {unknown[0]!r}", remedy=f"choose from {', '.join(CASES)}")
    for check in (CASES[name].check for name in faults):
        if check is not None:
            check()
    config = config.replace(
        checkpoint=config.checkpoint.replace(url=""),
        recovery=config.recovery.replace(supervise=True),  # a single rank too
    )
    directory.mkdir(parents=True)
    log = get_logger("chaos")
    whole = directory / "unbroken"
    log.info("training unbroken", ranks=config.mesh.size)
    _train_unbroken(config, whole)
    final = read_final(whole)
    reports = []
    for name in faults:
        log.info("training under a fault", fault=name, what=CASES[name].what)
        reports.append(_report(name, _broken_run(name, whole, directory), whole))
    certificate = Certificate(
        ranks=config.mesh.size,
        steps=final["steps"],
        losses_sha256=final["losses"]["sha256"],
        weights_sha256=final["weights_sha256"],
        faults=reports,
    )
    parent = open_artifact(whole / MODEL_DIRECTORY, kind="model")
    with create_artifact(destination, kind="report", parents=[parent], config=config) as draft:
        (draft.path / CERTIFICATE_FILE).write_text(certificate.model_dump_json(indent=1) + "\n")
        draft.metrics = {"holds": certificate.holds, "faults": len(reports)}
    assert draft.artifact is not None
    return draft.artifact


def read_certificate(report: Artifact) -> Certificate:
    """Read the certificate of a report artifact."""
    return Certificate.model_validate_json((report.path / CERTIFICATE_FILE).read_bytes())


def _command(recipe: Path, run_dir: Path, overrides: Sequence[str] = ()) -> list[str]:
    sets = [word for assignment in overrides for word in ("--set", assignment)]
    arguments = ["train", str(recipe), "--run-dir", str(run_dir), "--json", *sets]
    return [sys.executable, "-m", "minigpt", *arguments]


def _train_unbroken(config: TrainConfig, run_dir: Path) -> None:
    recipe = run_dir.with_name("recipe.yaml")
    recipe.write_text(to_yaml(config))
    run = ChaosRun(run_dir, _command(recipe, run_dir), dict(os.environ), 0, 0)
    run.start()
    assert run.process is not None
    _, errors = run.process.communicate(timeout=_RUN_SECONDS)
    if run.process.returncode != 0:
        raise TrainingError(f"the unbroken run failed: {errors.strip().splitlines()[-1]}")


def _broken_run(name: str, whole: Path, directory: Path) -> ChaosRun:
    """Run the unbroken run's resolved config under a fault, to its end."""
    case, stored = CASES[name], stored_config(whole)
    assert stored is not None and isinstance(stored.steps, int)
    run_dir = directory / name
    checkpoint = next((whole / CHECKPOINT_DIRECTORY).glob("step-*"))
    sixth = max(1, stored.steps // 6)
    run = ChaosRun(
        run_dir,
        _command(whole / "config.yaml", run_dir, [o.format(sixth=sixth) for o in case.overrides]),
        os.environ | {VARIABLE: _faults(case, stored)},
        stored.steps,
        sum(path.stat().st_size for path in checkpoint.rglob("*")),
    )
    clear = case.prepare(run) if case.prepare is not None else None
    begin = time.monotonic()
    try:
        run.start()
        if case.meddle is not None:
            case.meddle(run)
        assert run.process is not None
        run.process.communicate(timeout=_RUN_SECONDS)
        run.seconds = time.monotonic() - begin
    finally:
        if run.process is not None:
            run.process.kill()
            run.process.wait()
        if clear is not None:
            clear()
    return run


def _faults(case: Case, config: TrainConfig) -> str:
    """Fill in the last rank, and a step in the middle and a late one, between two saves."""
    assert isinstance(config.steps, int)
    return case.faults.format(
        last=config.mesh.size - 1, step=config.steps // 2 + 1, late=3 * config.steps // 4 + 1
    )


def _report(name: str, run: ChaosRun, whole: Path) -> FaultReport:
    assert run.process is not None
    expected = read_final(whole)
    finished = (run.directory / "final.json").exists()
    final = read_final(run.directory) if finished else {"losses": {"sha256": ""}}
    events = list(read_metrics(run.directory / EVENTS_FILE))
    goodput = read_goodput(events)
    usual = ("session", "session_end", "validation", "checkpoint")
    losses, weights = final["losses"]["sha256"], final.get("weights_sha256", "")
    recoveries = goodput.recoveries if goodput is not None else []
    noticed = list(dict.fromkeys(e["kind"] for e in events if e["kind"] not in usual))
    struck = len(list((run.directory / "ranks" / "struck").glob("*")))
    asked = len(parse_faults(run.environment[VARIABLE]))
    made_up = [event["seconds"] for event in events if event["kind"] == "save_made_up"]
    return FaultReport(
        fault=name,
        what=CASES[name].what,
        happened=struck == asked and set(CASES[name].shows) <= set(noticed),
        finished=finished,
        equal=(losses, weights) == (expected["losses"]["sha256"], expected["weights_sha256"]),
        losses_sha256=losses,
        weights_sha256=weights,
        noticed=noticed,
        recovery_seconds=max(recoveries, default=None),
        unsaved_seconds=max(made_up, default=None),
        wall_seconds=run.seconds,
        goodput=goodput.goodput if goodput is not None else None,
    )
