#!/usr/bin/env bash
# Lint, types and tests in .venv.   scripts/test.sh [--slow] [pytest's arguments]
# MEMTX_DATA may name a folder with pg19-mini in it; the tests that need real books are skipped without it.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh dev
marks="not slow"
if [ "${1:-}" = "--slow" ]; then
  marks=""
  shift
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
# A process a core, each on one thread: two processes of two threads on two cores wait for each other.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec .venv/bin/pytest -m "$marks" -n auto --dist loadfile "$@"
