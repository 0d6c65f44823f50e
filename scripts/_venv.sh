# Sourced by the other scripts: make_venv EXTRAS makes or updates .venv in the project's root and
# leaves its path in $VENV. Nothing outside .venv is written, apart from pip's cache.
#
# The second run is instant: a stamp holds a hash of everything the installation depends on.
# PIP_* variables and pip's configuration are honoured, e.g. PIP_INDEX_URL for a mirror.
source "$(dirname "${BASH_SOURCE[0]}")/_help.sh"

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"

find_python() {
  local name
  for name in python3.13 python3.12 python3.11 python3; do
    if "$name" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
      2>/dev/null; then
      command -v "$name"
      return
    fi
  done
  echo "No Python 3.11 to 3.13 with the venv module was found (tried python3.13, python3.12," >&2
  echo "python3.11, python3). On Debian or Ubuntu: apt install python3 python3-venv" >&2
  return 1
}

# Text that changes when the installation must be redone.
installation_inputs() {
  local extras="$1"
  echo "$extras ${DANCEGRPO_FAST_NATIVE:-AUTO} ${CXX:-} ${DANCEGRPO_FAST_CUDA:-AUTO}" \
    "${DANCEGRPO_FAST_CUDA_ARCHS:-} ${CUDACXX:-}"
  (cd "$ROOT" && cat pyproject.toml constraints.txt setup.py CMakeLists.txt csrc/*.{h,cpp,cu})
}

# On Linux, PyPI's torch wheel brings CUDA (3 GB). The user decides where wheels come from.
hint_cpu_wheel() {
  if [[ "$(uname -s)" == Linux && ! -e /proc/driver/nvidia/version && ! -e /dev/dxg ]] \
    && [[ -z "${PIP_INDEX_URL:-}${PIP_EXTRA_INDEX_URL:-}${PIP_FIND_LINKS:-}" ]] \
    && ! "$VENV/bin/pip" config list | grep -qE 'index-url|find-links|no-index'; then
    echo "No NVIDIA driver here: with PIP_EXTRA_INDEX_URL set to PyTorch's CPU index (pytorch.org,"
    echo "Get Started, CPU) the download is a tenth."
  fi
}

make_venv() {
  local extras="$1" stamp="$VENV/.installed-$1" hash python started=$SECONDS
  hash="$(installation_inputs "$extras" | cksum)"
  if [[ -f "$stamp" && "$(cat "$stamp")" == "$hash" ]]; then
    return
  fi
  if [[ ! -x "$VENV/bin/python" ]]; then
    python="$(find_python)"
    echo "Making .venv with $python ($("$python" --version))"
    "$python" -m venv "$VENV"
  fi
  hint_cpu_wheel
  echo "Installing dancegrpo-fast[$extras] into .venv (a few minutes the first time)"
  # --no-compile: bytecode is written on first import, for the modules that are used.
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile \
    --editable "$ROOT[$extras]" --constraint "$ROOT/constraints.txt"
  # Only now: an interrupted installation leaves no stamp.
  echo "$hash" >"$stamp"
  echo "Installed in $((SECONDS - started)) s"
}
