#!/usr/bin/env bash
# The same command on every machine, without a scheduler:
#   HEAD=host-a MACHINES=4 examples/cluster/multi_machine.sh recipes/flux_hps.yaml runs/flux [key=value ...]
# All machines reach HEAD's port and share the folder of the run. A process that dies is restarted
# and resumes; a machine that is gone ends the run, and the same command goes on with it later.
set -euo pipefail

head=${HEAD:?set HEAD to the name of one of the machines, the same on all}
machines=${MACHINES:?set MACHINES to their number}
gpus=${GPUS:-8}
port=${PORT:-29500}
recipe=${1:?usage: multi_machine.sh RECIPE.yaml OUTPUT [key=value ...]}
output=${2:?usage: multi_machine.sh RECIPE.yaml OUTPUT [key=value ...]}
shift 2

resume=()
if [[ -s "$output/metrics.jsonl" ]]; then
  resume=(--resume latest)
fi
exec torchrun \
  --nnodes "$machines" --nproc-per-node "$gpus" \
  --rdzv-backend c10d --rdzv-id "${RUN_ID:-dancegrpo}" --rdzv-endpoint "$head:$port" \
  --max-restarts 3 --shutdown-timeout 240 \
  -m dancegrpo_fast train "$recipe" "output=$output" \
  "parallel.dp_replicate=$machines" checkpoint.grace_seconds=200 \
  "$@" ${resume[@]+"${resume[@]}"}
