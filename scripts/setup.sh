#!/usr/bin/env bash
# Creates .venv and installs memtx into it; the other scripts call this. Safe to repeat.
#   scripts/setup.sh [extra]      extra: for example "dev"
# MEMTX_TORCH selects the torch version if none is installed; MEMTX_PYTHON selects the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
extra="${1:-}"
python="${MEMTX_PYTHON:-python3}"
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  echo "setup: $python is missing or older than Python 3.11; set MEMTX_PYTHON to a newer one." >&2
  exit 2
fi
[ -x .venv/bin/python ] || "$python" -m venv .venv
# The stamp file is compared with pyproject.toml, so that a second run takes no time.
stamp=".venv/memtx-installed-$extra"
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
  # A version range would install the newest torch, with gigabytes of CUDA on a machine without a GPU. On a GPU machine,
  # install your torch build into .venv first: it is not replaced.
  .venv/bin/python -c 'import torch' 2>/dev/null || .venv/bin/pip install --quiet "torch==${MEMTX_TORCH:-2.13.0}"
  .venv/bin/pip install --quiet --editable ".${extra:+[$extra]}"
  touch "$stamp"
fi
