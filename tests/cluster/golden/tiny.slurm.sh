#!/bin/bash
#SBATCH --job-name=tiny
#SBATCH --account=research
#SBATCH --partition=gpu
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=2
#SBATCH --mem=4096M
#SBATCH --time=2-00:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --chdir=/home/ada/minigpt
#SBATCH --output=tiny-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
set -u
MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export MASTER_ADDR
srun --kill-on-bad-exit=1 bash -c 'exec minigpt train recipes/350m.yaml --run-dir '"'"'runs/350 m'"'"'' &
step=$!
trap 'kill -TERM "$step"' TERM
wait "$step"; wait "$step"
status=$?
if [ "$status" -ne 0 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 3 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
