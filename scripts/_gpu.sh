# Sourced by scripts/gpu and scripts/gpu_models: `step`, which runs, limits, logs and records a step.
# A step that fails does not stop the others; `finish` prints the summary and exits with what it says.
# Each step adds a row to verification.jsonl in FOLDER, if the tree is clean (COMMIT names the commit
# of a copy without git); python scripts/readme.py then shows those of benchmarks/results.

source "$(dirname "${BASH_SOURCE[0]}")/_help.sh"
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="${PYTHON:-python3}"
mkdir -p "${1:-$ROOT/benchmarks/results}"
OUT="$(cd "${1:-$ROOT/benchmarks/results}" && pwd)"
cd "$ROOT" || exit 1
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
summary="" failed=0

# step NAME SECONDS COMMAND...: runs it under a limit, keeps its log, notes its exit code.
step() {
  local name="$1" limit="$2" started=$SECONDS code
  shift 2
  echo "== $name"
  timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$OUT/gpu_$name.log"
  code=${PIPESTATUS[0]}
  summary+="$(printf '%-12s exit code %-4s %4d s' "$name" "$code" $((SECONDS - started)))"$'\n'
  ((code == 0)) || failed=1
  "$PYTHON" scripts/record.py "$OUT/verification.jsonl" "$name" "$code"
}

finish() {
  printf '\n== summary\n%s' "$summary" | tee "$OUT/$1.log"
  exit "$failed"
}
