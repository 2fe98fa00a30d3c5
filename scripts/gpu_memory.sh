#!/usr/bin/env bash
# On a machine with a GPU: memories compared on books at equal parameters and tokens, within 8 minutes.
#   scripts/gpu_memory.sh [books [folder]]
# The books are in the PG-19 layout (MEMTX_DATA/pg19-mini by default); tables, JSON and a picture go to the folder
# (runs/gpu-memory by default), runs to its subfolder. MEMTX_PYTHON selects the interpreter, whose torch must be a CUDA
# build. MEMTX_SIZE=tiny tries all parts in a minute, on a CPU too. If a part fails, the tables show the others.
set -uo pipefail
cd "$(dirname "$0")/.."
source scripts/gpu_parts.sh
books="${1:-${MEMTX_DATA:+$MEMTX_DATA/pg19-mini}}"
size="${MEMTX_SIZE:-full}"
begin_parts "${2:-runs/gpu-memory}" 447
compare=("$python" scripts/compare_gpu_memories.py --size "$size" --output-dir "$out/runs")
stacks="$("${compare[@]}" names)" && "${compare[@]}" plan || exit 2
[ -d "$books" ] || { echo "gpu: '$books' is no folder; give the books' folder, or set MEMTX_DATA." >&2; exit 2; }
[ "$size" = tiny ] || require_gpu
part 70 tokens "${compare[@]}" prepare --root "$books"
for stack in $stacks; do
  part 75 "$stack" "${compare[@]}" train "$stack"
done
# The tables are written in any case: thirty seconds are left for them.
end=$((end + 30))
part 25 tables "${compare[@]}" tables --json "$out/memories.json" --markdown "$out/memories.md" \
  --plot "$out/memories.png"
end_parts
