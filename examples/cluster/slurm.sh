#!/bin/bash
# One torchrun per machine. Submitted or requeued again, the same script goes on where it stopped:
#   sbatch examples/cluster/slurm.sh recipes/flux_hps.yaml runs/flux [key=value ...]
# Not tried on a Slurm cluster.
#SBATCH --job-name=dancegrpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# 300 s before the end of its time torchrun gets SIGTERM, saves and ends.
#SBATCH --signal=TERM@300
set -euo pipefail

recipe=${1:?usage: sbatch slurm.sh RECIPE.yaml OUTPUT [key=value ...]}
output=${2:?usage: sbatch slurm.sh RECIPE.yaml OUTPUT [key=value ...]}
shift 2

resume=()
if [[ -s "$output/metrics.jsonl" ]]; then
  resume=(--resume latest)
fi
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# The machines share the folder of the run, the weights (HF_HUB_CACHE) and this environment.
export HF_HUB_OFFLINE=1
srun torchrun \
  --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node 8 \
  --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$head:29500" \
  --max-restarts 3 --shutdown-timeout 240 \
  -m dancegrpo_fast train "$recipe" "output=$output" \
  "parallel.dp_replicate=$SLURM_JOB_NUM_NODES" checkpoint.grace_seconds=200 \
  "$@" ${resume[@]+"${resume[@]}"}
