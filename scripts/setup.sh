#!/usr/bin/env bash
# Makes .venv and installs memtx into it; the other scripts call this. Re-runnable.
#   scripts/setup.sh [extra]      extra: for example "dev"
# MEMTX_TORCH chooses the torch version where none is there yet; MEMTX_PYTHON the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
extra="${1:-}"
python="${MEMTX_PYTHON:-python3}"
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  echo "setup: $python is missing or older than Python 3.11; set MEMTX_PYTHON to a newer one." >&2
  exit 2
fi
[ -x .venv/bin/python ] || "$python" -m venv .venv
# What is installed is remembered by the file that decides it, so that a second run takes no time.
stamp=".venv/memtx-installed-$extra"
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
  # A range would take the newest torch, which brings gigabytes of CUDA to a machine without a GPU. On a GPU
  # machine, install your torch build into .venv first: it is kept.
  .venv/bin/python -c 'import torch' 2>/dev/null || .venv/bin/pip install --quiet "torch==${MEMTX_TORCH:-2.13.0}"
  .venv/bin/pip install --quiet --editable ".${extra:+[$extra]}"
  touch "$stamp"
fi
