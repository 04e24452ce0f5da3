#!/usr/bin/env bash
#SBATCH --job-name=rbpjax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --time=01:00:00
#SBATCH --requeue
# One process a node; the folder must be on a file system that all nodes share.
srun --kill-on-bad-exit=1 \
  python -m examples.distributed.train --folder "${RUN_FOLDER:-runs/mnist}"
code=$?
# 75: a peer is gone. The job goes on from its last checkpoint.
if [ "$code" -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
