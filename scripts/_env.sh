# Sourced by the other scripts. Sets ROOT and ENV_PYTHON, and makes .venv first where it is missing or out of date.
# shellcheck shell=bash

ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
ENV_PYTHON="$ROOT/.venv/bin/python"

sha256_of_stdin() {
  if command -v sha256sum >/dev/null; then sha256sum; else shasum -a 256; fi
}

# What an environment is made from: its place (an editable install points there), its recipe and its versions.
environment_key() {
  { printf '%s\n' "$ROOT"; cat -- "$ROOT/pyproject.toml" "$ROOT/constraints.txt" "$ROOT/scripts/_setup_env.py"; } |
    sha256_of_stdin
}

find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3.14 python3 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      printf '%s\n' "$candidate"
      return
    fi
    if [[ -n "${PYTHON:-}" ]]; then
      echo "kind-edge: PYTHON=$PYTHON does not run or is older than Python 3.11" >&2
      return 1
    fi
  done
  echo "kind-edge: no Python 3.11 or newer found; install one, or name it: PYTHON=/path/to/python $0" >&2
  return 1
}

ensure_environment() {
  local key stamp="" python
  key="$(environment_key)"
  key="${key%% *}"
  if [[ -r "$ROOT/.venv/.ready" ]]; then stamp="$(<"$ROOT/.venv/.ready")"; fi
  if [[ "$stamp" == "$key" && -x "$ENV_PYTHON" ]]; then return; fi
  python="$(find_python)" || exit 1
  "$python" "$ROOT/scripts/_setup_env.py" "$ROOT" "$key" </dev/null || exit 1
  # Training and judging need the images; everything else does without.
  "$ROOT/scripts/fetch-fashion-mnist" --quiet </dev/null || true
}

ensure_environment
