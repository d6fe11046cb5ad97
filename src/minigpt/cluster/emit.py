"""The same job for other schedulers: a Slurm script, Kueue manifests, a SkyPilot task.

Each starts one torchrun a node, which starts that node's workers with the variables that they
find everywhere else; a single worker runs without it.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from minigpt.cluster.config import JobConfig
from minigpt.core.config import Config, load_config
from minigpt.core.errors import ConfigError

Target = Literal["slurm", "kueue", "sky"]
_PORT = 29_500
_MOUNT = "/work"


class SiteConfig(Config):
    """What a job does not say about the place where it runs."""

    gpus_per_node: int = Field(default=8, ge=1)
    """GPUs of a node."""
    cpus_per_node: int = Field(default=64, ge=1)
    """Cores of a node; decides the nodes of a job without GPUs."""
    partition: str = ""
    """Slurm: the partition; empty is the default one."""
    account: str = ""
    """Slurm: the account; empty is the job's team."""
    image: str = ""
    """Kueue: the container image, with its tag or digest. Required there."""
    namespace: str = "default"
    """Kueue: the namespace."""
    queue: str = ""
    """Kueue: the LocalQueue; empty is the job's team."""
    priority_class: str = ""
    """Kueue: the WorkloadPriorityClass; empty is none."""
    volume_claim: str = ""
    """Kueue: a claim mounted at /work, where the command runs; empty is a scratch volume."""
    infra: str = ""
    """SkyPilot: cloud[/region[/zone]]; empty lets it choose."""
    gpu_type: str = "H100"
    """SkyPilot: the accelerator's name."""
    use_spot: bool = False
    """SkyPilot: on spot machines."""


@dataclass(frozen=True)
class _Shape:
    """How a gang divides into nodes."""

    nodes: int
    per_node: int


def emit_job(job: JobConfig, target: Target, site: Sequence[str] = ()) -> str:
    """Render a job for another scheduler.

    Args:
        job: The job.
        target: Whose form.
        site: Assignments to SiteConfig's keys, such as `image=registry/minigpt:1`.

    Raises:
        ConfigError: The gang does not divide evenly into nodes, or a key is unknown or missing.
    """
    settings = load_config(SiteConfig, None, site)
    shape = _divide(job, settings)
    if target == "slurm":
        return _slurm(job, settings, shape)
    if target == "kueue":
        return _yaml(*_kueue(job, settings, shape))
    return _yaml(_sky(job, settings, shape))


def _divide(job: JobConfig, site: SiteConfig) -> _Shape:
    each = job.resources
    room = int(site.cpus_per_node / each.cpus)
    if each.gpus:
        room = min(room, site.gpus_per_node // each.gpus)
    if room == 0:
        raise ConfigError(
            f"a worker of {each.cpus:g} cores and {each.gpus} GPUs does not fit a node of "
            f"{site.cpus_per_node} cores and {site.gpus_per_node} GPUs",
            remedy="see --site cpus_per_node and gpus_per_node",
        )
    nodes = math.ceil(job.workers / room)
    if job.workers % nodes:
        raise ConfigError(
            f"workers = {job.workers} does not divide evenly into {nodes} nodes of at most {room}",
            remedy="choose a multiple, or another --site gpus_per_node",
        )
    if nodes > 1 and job.placement == "strict-pack":
        raise ConfigError(
            f"placement = strict-pack, but {job.workers} workers need {nodes} nodes",
            remedy="use placement: pack",
        )
    return _Shape(nodes, job.workers // nodes)


def _launch(job: JobConfig, shape: _Shape, *, node_rank: str, head: str) -> str:
    """Return the shell words that start a node's workers."""
    command = shlex.join(job.command)
    if job.workers == 1:
        return command
    return (
        f"torchrun --nnodes={shape.nodes} --nproc-per-node={shape.per_node} "
        f"--node-rank={node_rank} --master-addr={head} --master-port={_PORT} "
        f"--no-python {command}"
    )


def _slurm(job: JobConfig, site: SiteConfig, shape: _Shape) -> str:
    each = job.resources
    directives = {
        "job-name": job.name,
        "account": site.account or job.team,
        "partition": site.partition,
        "nodes": shape.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": math.ceil(each.cpus * shape.per_node),
        "mem": f"{math.ceil(each.memory_gib * shape.per_node * 1024)}M",
        "gres": f"gpu:{each.gpus * shape.per_node}" if each.gpus else "",
        "time": _slurm_time(job.max_seconds),
        # To the batch shell alone, which passes it on: in time for a last checkpoint.
        "signal": f"B:TERM@{math.ceil(job.grace_seconds)}" if job.grace_seconds else "",
        "nice": -job.priority if job.priority else "",
        "chdir": job.workdir,
        "output": f"{job.name}-%j.log",
        "open-mode": "append",
    }
    for name, value in directives.items():
        if any(character.isspace() for character in str(value)):
            raise ConfigError(f"slurm: {name} = {str(value)!r}: a directive can't hold spaces")
    lines = ["#!/bin/bash"]
    lines += [f"#SBATCH --{name}={value}" for name, value in directives.items() if value != ""]
    lines += ["#SBATCH --requeue" if job.evictable else "#SBATCH --no-requeue", "set -u"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in job.env.items()]
    launch = _launch(job, shape, node_rank='"$SLURM_NODEID"', head='"$MASTER_ADDR"')
    lines += [
        'MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"',
        "export MASTER_ADDR",
        f"srun --kill-on-bad-exit=1 bash -c {shlex.quote('exec ' + launch)} &",
        "step=$!",
        "trap 'kill -TERM \"$step\"' TERM",
        # The first wait ends when the trap has run, the second when the step has.
        'wait "$step"; wait "$step"',
        "status=$?",
        f'if [ "$status" -ne 0 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {job.retries} ]; then',
        '  scontrol requeue "$SLURM_JOB_ID"',
        "fi",
        'exit "$status"',
    ]
    return "\n".join(lines) + "\n"


def _slurm_time(seconds: float) -> str:
    minutes = math.ceil(seconds / 60)
    return f"{minutes // 1440}-{minutes // 60 % 24:02}:{minutes % 60:02}:00"


def _kueue(job: JobConfig, site: SiteConfig, shape: _Shape) -> list[dict[str, Any]]:
    """Return a headless Service for the rendezvous and a suspended Indexed Job, a pod a node."""
    if not site.image:
        raise ConfigError("kueue needs a container image", remedy="--site image=REGISTRY/NAME:TAG")
    labels = {
        "app.kubernetes.io/name": "minigpt",
        "app.kubernetes.io/instance": job.name,
        "minigpt/team": job.team,
    }
    queue = {"kueue.x-k8s.io/queue-name": site.queue or job.team}
    if site.priority_class:
        queue["kueue.x-k8s.io/priority-class"] = site.priority_class
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": job.name, "namespace": site.namespace, "labels": labels},
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {"app.kubernetes.io/instance": job.name},
            "ports": [{"name": "rendezvous", "port": _PORT}],
        },
    }
    manifest = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": job.name, "namespace": site.namespace, "labels": labels | queue},
        "spec": {
            "suspend": True,  # Kueue lifts it when there is room for all pods
            "completionMode": "Indexed",
            "completions": shape.nodes,
            "parallelism": shape.nodes,
            "backoffLimit": job.retries * shape.nodes,
            "activeDeadlineSeconds": math.ceil(job.max_seconds),
            "template": {"metadata": {"labels": labels}, "spec": _pod(job, site, shape)},
        },
    }
    return [service, manifest]


def _pod(job: JobConfig, site: SiteConfig, shape: _Shape) -> dict[str, Any]:
    each = job.resources
    amounts = {
        "cpu": f"{round(each.cpus * shape.per_node * 1000)}m",
        "memory": f"{math.ceil(each.memory_gib * shape.per_node * 1024)}Mi",
    }
    if each.gpus:
        amounts["nvidia.com/gpu"] = str(each.gpus * shape.per_node)
    head = f"{job.name}-0.{job.name}"
    launch = _launch(job, shape, node_rank='"$JOB_COMPLETION_INDEX"', head=head)
    volume = (
        {"persistentVolumeClaim": {"claimName": site.volume_claim}}
        if site.volume_claim
        else {"emptyDir": {}}
    )
    return {
        "restartPolicy": "Never",
        "subdomain": job.name,
        "terminationGracePeriodSeconds": math.ceil(job.grace_seconds),
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 10_001,
            "runAsGroup": 10_001,
            "fsGroup": 10_001,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [
            {
                "name": "worker",
                "image": site.image,
                "command": ["bash", "-c", _literal(f"exec {launch}")],
                "workingDir": _MOUNT,
                "env": _pod_env({"MINIGPT_HOME": f"{_MOUNT}/.minigpt"} | job.env),
                "resources": {"requests": amounts, "limits": dict(amounts)},
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                },
                "volumeMounts": [
                    {"name": "work", "mountPath": _MOUNT},
                    {"name": "tmp", "mountPath": "/tmp"},
                    {"name": "shm", "mountPath": "/dev/shm"},
                ],
            }
        ],
        "volumes": [
            {"name": "work"} | volume,
            {"name": "tmp", "emptyDir": {}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ],
    }


def _pod_env(env: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "value": _literal(value)} for name, value in env.items()]


def _literal(text: str) -> str:
    """Keep Kubernetes from putting variables in the place of `$(NAME)`."""
    return text.replace("$(", "$$(")


def _sky(job: JobConfig, site: SiteConfig, shape: _Shape) -> dict[str, Any]:
    each = job.resources
    resources: dict[str, Any] = {
        "cpus": f"{math.ceil(each.cpus * shape.per_node)}+",
        "memory": f"{math.ceil(each.memory_gib * shape.per_node)}+",
        "use_spot": site.use_spot,
        "job_recovery": {"max_restarts_on_errors": job.retries},
    }
    if site.infra:
        resources = {"infra": site.infra} | resources
    if each.gpus:
        resources["accelerators"] = f"{site.gpu_type}:{each.gpus * shape.per_node}"
    launch = _launch(job, shape, node_rank='"$SKYPILOT_NODE_RANK"', head='"$head"')
    limit = f"exec timeout --kill-after={math.ceil(job.grace_seconds)} {math.ceil(job.max_seconds)}"
    run = 'head="$(head -n 1 <<< "$SKYPILOT_NODE_IPS")"\n' if job.workers > 1 else ""
    task: dict[str, Any] = {"name": job.name}
    if job.workdir:
        task["workdir"] = job.workdir
    task |= {"num_nodes": shape.nodes, "resources": resources}
    if job.env:
        task["envs"] = dict(job.env)
    return task | {"run": f"{run}{limit} {launch}\n"}


def _yaml(*documents: dict[str, Any]) -> str:
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: object) -> bool:
            return True

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        style = "|" if "\n" in value else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Dumper.add_representer(str, text)
    return yaml.dump_all(documents, Dumper=Dumper, sort_keys=False, width=1000)
