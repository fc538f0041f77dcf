#!/usr/bin/env bash
# Trains on a Slurm cluster with one process per GPU, and requeues itself at the time limit:
#
#   sbatch --nodes 2 examples/slurm.sh imagenet-b16-300ep --data /shared/pack --out /shared/runs/b16
#
# --data must be the same on all nodes; only the first node writes --out. scancel stops the job.

#SBATCH --job-name=vitral
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=128
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300

set -euo pipefail

export OMP_NUM_THREADS=1                    # train.threads overrides this later
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # otherwise a restart may use the old address
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240   # seconds for the checkpoint, less than the 300 above

srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" torchrun \
    --nnodes="$SLURM_NNODES" \
    --nproc-per-node=gpu \
    --max-restarts=3 \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    --rdzv-id="$SLURM_JOB_ID" \
    --rdzv-backend=c10d \
    --rdzv-endpoint="$(hostname):$((20000 + SLURM_JOB_ID % 10000))" \
    -m vitral train "$@" &
step=$!

# Before the time limit, Slurm signals only this script. srun forwards SIGUSR1 to all processes,
# which write a checkpoint; on SIGTERM it would kill them.
time_is_up=false
trap 'time_is_up=true; kill -USR1 "$step" || true' USR1

code=0
wait "$step" || code=$?
if "$time_is_up"; then
    wait "$step" || true # the signal ended the first wait
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
