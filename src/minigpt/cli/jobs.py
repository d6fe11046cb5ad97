"""`minigpt jobs`: a queue of jobs, the scheduler that serves it, job specs, simulation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from minigpt.cli.output import JsonOption, SetOption, config_epilog, emit
from minigpt.cluster.config import GIB, JobConfig, QueueConfig
from minigpt.cluster.simulate import SimulationConfig

if TYPE_CHECKING:
    from minigpt.cluster.records import Attempt, Job
    from minigpt.cluster.store import JobStore

app = typer.Typer()

QueueOption = Annotated[
    str | None,
    typer.Option(
        "--queue",
        metavar="URL",
        envvar="MINIGPT_JOBS_URL",
        help="sqlite:///PATH or postgresql://USER@HOST/NAME; default: jobs.db in minigpt's home.",
    ),
]
JobArgument = Annotated[int, typer.Argument(metavar="JOB", min=1, help="The job's number.")]
JobFileArgument = Annotated[
    Path | None, typer.Argument(metavar="[JOB.yaml]", help="A YAML file of the keys below.")
]


@app.command(
    epilog=config_epilog(
        JobConfig,
        example="minigpt jobs submit --set name=tiny --set team=research "
        "--set 'command=[minigpt, train, recipes/tiny.yaml, --run-dir, runs/tiny]'",
    )
)
def submit(
    file: JobFileArgument = None,
    overrides: SetOption = None,
    queue: QueueOption = None,
    json: JsonOption = False,
) -> None:
    """Add a job to the queue; it is safe there when this returns."""
    job = _store(queue).submit(_load_job(file, overrides))
    emit(_summary(job), json=json, human=lambda: typer.echo(f"job {job.id} queued"))


@app.command(name="list", epilog="Example: minigpt jobs list --all")
def list_command(
    everything: Annotated[bool, typer.Option("--all", help="Ended jobs as well.")] = False,
    team: Annotated[str | None, typer.Option(help="Only this team's.")] = None,
    queue: QueueOption = None,
    json: JsonOption = False,
) -> None:
    """List the jobs that wait or run."""
    found = _store(queue).jobs() if everything else _store(queue).jobs(["queued", "running"])
    jobs = [_summary(job) for job in found if team is None or job.config.team == team]
    emit({"jobs": jobs}, json=json, human=lambda: _print_jobs(jobs))


@app.command(epilog="Example: minigpt jobs show 3")
def show(job: JobArgument, queue: QueueOption = None, json: JsonOption = False) -> None:
    """Show a job: what it asked for, where it ran and why it is in its state."""
    store = _store(queue)
    found = store.get(job)
    attempts = [_attempt_summary(attempt) for attempt in store.attempts(job)]
    result = _summary(found) | {"config": found.config, "attempts": attempts}
    emit(result, json=json, human=lambda: _print_job(result))


@app.command(epilog="Example: minigpt jobs logs 3 --follow")
def logs(
    job: JobArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the job ends.")] = False,
    attempt: Annotated[int | None, typer.Option(min=1, help="Default: the last one.")] = None,
    rank: Annotated[int | None, typer.Option(min=0, help="One worker; default: all.")] = None,
    queue: QueueOption = None,
) -> None:
    """Print what a job's workers have written."""
    from minigpt.cluster.logs import read_logs

    for line in read_logs(_store(queue), job, number=attempt, rank=rank, follow=follow):
        typer.echo(line)


@app.command(epilog="Example: minigpt jobs cancel 3")
def cancel(job: JobArgument, queue: QueueOption = None, json: JsonOption = False) -> None:
    """Take a waiting job off the queue, or stop a running one within its grace period."""
    found = _store(queue).request_cancel(job)
    what = "cancelled" if found.state == "cancelled" else "is being stopped"
    emit(_summary(found), json=json, human=lambda: typer.echo(f"job {job} {what}"))


@app.command(
    name="run",
    epilog=config_epilog(QueueConfig, example="minigpt jobs run --set policy.preemption=false"),
)
def run_command(
    file: Annotated[
        Path | None, typer.Argument(metavar="[QUEUE.yaml]", help="A YAML file of the keys below.")
    ] = None,
    until_empty: Annotated[
        bool, typer.Option("--until-empty", help="End when no job waits or runs.")
    ] = False,
    overrides: SetOption = None,
    queue: QueueOption = None,
    json: JsonOption = False,
) -> None:
    """Serve the queue until SIGTERM or Ctrl-C; jobs run on, and are found again at the next start.

    Kill it at any moment: no job is lost and none runs twice at a time.
    """
    from minigpt.cluster.run import run_queue
    from minigpt.core.config import load_config
    from minigpt.core.telemetry import configure_logging

    configure_logging(json=json)
    config = load_config(QueueConfig, file, overrides or [])
    run_queue(config, _url(queue), until_empty=until_empty)


@app.command(epilog="Example: minigpt jobs nodes")
def nodes(queue: QueueOption = None, json: JsonOption = False) -> None:
    """Show the nodes that the scheduler sees, what is free there and how jobs are kept apart."""
    from minigpt.cluster.run import node_table

    store = _store(queue)
    rows = node_table(store)
    emit({"scheduler": store.holder(), "nodes": rows}, json=json, human=lambda: _print_nodes(rows))


@app.command(
    name="emit",
    epilog=config_epilog(JobConfig, example="minigpt jobs emit job.yaml --target slurm"),
)
def emit_command(
    target: Annotated[Literal["slurm", "kueue", "sky"], typer.Option(help="Whose job spec.")],
    file: JobFileArgument = None,
    overrides: SetOption = None,
    site: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="What the job does not say: see docs/cluster.md."),
    ] = None,
) -> None:
    """Print the same job for another scheduler: a Slurm script, Kueue manifests, a SkyPilot task.

    The target's own facts go by --site: image, queue, partition, gpus_per_node, gpu_type ...
    """
    from minigpt.cluster.emit import emit_job

    typer.echo(emit_job(_load_job(file, overrides), target, site or []), nl=False)


@app.command(
    epilog=config_epilog(
        SimulationConfig, example="minigpt jobs simulate --set gpus=16384 --set seeds=20"
    )
)
def simulate(
    file: Annotated[
        Path | None, typer.Argument(metavar="[SIM.yaml]", help="A YAML file of the keys below.")
    ] = None,
    overrides: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Estimate the effective training time of a cluster with failures. Simulated, not measured."""
    from minigpt.cluster.simulate import simulate as run_simulation
    from minigpt.core.config import load_config

    result = run_simulation(load_config(SimulationConfig, file, overrides or []))
    emit(result.summary(), json=json, human=lambda: _print_simulation(result.summary()))


def _url(queue: str | None) -> str:
    from minigpt.cluster.database import default_url

    return queue or default_url()


def _store(queue: str | None) -> JobStore:
    from minigpt.cluster.store import JobStore

    return JobStore(_url(queue))


def _load_job(file: Path | None, overrides: Sequence[str] | None) -> JobConfig:
    from minigpt.core.config import load_config

    config = load_config(JobConfig, file, overrides or [])
    return config.replace(workdir=str((Path.cwd() / config.workdir).resolve()))


def _summary(job: Job) -> dict[str, Any]:
    return {
        "id": job.id,
        "name": job.config.name,
        "team": job.config.team,
        "priority": job.config.priority,
        "state": job.state,
        "reason": job.reason,
        "attempt": job.attempt,
        "failures": job.failures,
        "losses": job.losses,
        "evictions": job.evictions,
        "submitted_by": job.submitted_by,
        "submitted_at": job.submitted_at,
        "ended_at": job.ended_at,
    }


def _attempt_summary(attempt: Attempt) -> dict[str, Any]:
    return {
        "number": attempt.number,
        "nodes": list(attempt.placement),
        "started_at": attempt.started_at,
        "ended_at": attempt.ended_at,
        "outcome": attempt.outcome,
        "directory": attempt.directory,
    }


def _print_jobs(jobs: Sequence[Mapping[str, Any]]) -> None:
    if not jobs:
        typer.echo("no jobs")
    for job in jobs:
        typer.echo(
            f"{job['id']:>5}  {job['state']:<9}  {job['priority']:>4}  {job['team']:<12}  "
            f"{job['name']:<20}  {_time(job['submitted_at'])}  {job['reason']}".rstrip()
        )


def _print_job(job: Mapping[str, Any]) -> None:
    config: JobConfig = job["config"]
    each = config.resources
    typer.echo(f"job {job['id']} {job['name']}: {job['state']} {job['reason']}".rstrip())
    lines = {
        "command": " ".join(config.command),
        "asks for": f"{config.workers} x ({each.cpus:g} cores, {each.memory_gib:g} GiB, "
        f"{each.gpus} GPUs), priority {config.priority}, team {config.team}",
        "submitted": f"{_time(job['submitted_at'])} by {job['submitted_by']}",
        "so far": f"{job['failures']} failures, {job['losses']} losses, "
        f"{job['evictions']} evictions",
    }
    for label, text in lines.items():
        typer.echo(f"  {label:<9} {text}")
    for attempt in job["attempts"]:
        nodes = ",".join(dict.fromkeys(attempt["nodes"]))
        ended = _time(attempt["ended_at"]) if attempt["ended_at"] else "now"
        typer.echo(
            f"  attempt {attempt['number']} on {nodes}, {_time(attempt['started_at'])} to {ended}"
            f" {attempt['outcome']}  {attempt['directory']}"
        )


def _print_nodes(rows: Sequence[Mapping[str, Any]]) -> None:
    if not rows:
        typer.echo("no scheduler has served this queue yet: minigpt jobs run")
    for row in rows:
        total, free = row["total"], row["free"]
        typer.echo(
            f"{row['name']:<20} free {free['cpus']:g} of {total['cpus']:g} cores, "
            f"{free['memory'] / GIB:.1f} of {total['memory'] / GIB:.1f} GiB, "
            f"{free['gpus']} of {total['gpus']} GPUs; {row['isolation']}"
        )


def _print_simulation(result: Mapping[str, Any]) -> None:
    low, high = result["effective_interval"]
    typer.echo(
        f"effective training time  {result['effective']:.1%}  (95 % of seeds' mean: "
        f"{low:.1%} to {high:.1%}; Young/Daly closed form {result['closed_form']:.1%})"
    )
    for key in (
        "gpus",
        "mtbf_hours",
        "interruptions",
        "checkpoint_interval_seconds",
        "checkpoint_stall_seconds",
        "step_seconds",
    ):
        typer.echo(f"  {key.replace('_', ' '):<28} {result[key]:,.4g}")
    for name, share in result["shares"].items():
        typer.echo(f"  {name.replace('_', ' '):<28} {share:.2%} of the wall clock")


def _time(seconds: float) -> str:
    from datetime import UTC, datetime

    return f"{datetime.fromtimestamp(seconds, UTC):%m-%d %H:%M:%S}"
