#!/usr/bin/env bash
# Lint, types and tests in .venv.   scripts/test.sh [--slow] [pytest's arguments]
# MEMTX_DATA is a folder with pg19-mini, MEMTX_PARITY one of reference checkpoints; tests that need them are skipped
# without. The output ends with the skipped tests by reason.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh dev,gpu-tests
marks="not slow"
if [ "${1:-}" = "--slow" ]; then
  marks=""
  shift
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
# One process per core, one thread each: more threads than cores would wait for each other.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec .venv/bin/pytest -m "$marks" -n auto --dist loadfile "$@"
