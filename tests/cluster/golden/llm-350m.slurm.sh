#!/bin/bash
#SBATCH --job-name=llm-350m
#SBATCH --account=research
#SBATCH --partition=gpu
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=60
#SBATCH --mem=786432M
#SBATCH --gres=gpu:8
#SBATCH --time=2-00:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --nice=-10
#SBATCH --chdir=/home/ada/minigpt
#SBATCH --output=llm-350m-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
set -u
export NOTE='it'"'"'s $HOME'
MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export MASTER_ADDR
srun --kill-on-bad-exit=1 bash -c 'exec torchrun --nnodes=2 --nproc-per-node=8 --node-rank="$SLURM_NODEID" --master-addr="$MASTER_ADDR" --master-port=29500 --no-python minigpt train recipes/350m.yaml --run-dir '"'"'runs/350 m'"'"'' &
step=$!
trap 'kill -TERM "$step"' TERM
wait "$step"; wait "$step"
status=$?
if [ "$status" -ne 0 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 3 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
