#!/usr/bin/env bash
# On a machine with a GPU: the CUDA tests, then the benchmarks, within 7 minutes.   scripts/gpu.sh [folder]
# Writes JSON, Markdown and pictures into the folder (runs/gpu by default). MEMTX_PYTHON selects the interpreter, whose
# torch must be a CUDA build. If a part fails, the others still run and the exit code is 1; a benchmark that reaches its
# limit writes what it has measured.
set -uo pipefail
cd "$(dirname "$0")/.."
source scripts/gpu_parts.sh
cat <<'END'
tests: Triton, flex and banded attention against the float64 reference; a model against the CPU; decoding by graph
       replay against eager steps.
attention-64, -128: windows by memtx's Triton kernel, flex_attention, flash-attn; useful operations per second.
step: training step of memtx against x-transformers and compressive-transformer-pytorch.
step-350m: training step of 350 M parameters, share of the matrix peak.   stream: reading speed and state size.
END
begin_parts "${1:-runs/gpu}" 415
require_gpu

# bench NAME SECONDS SCRIPT OPTIONS...: the script stops in time to write its figures.
bench() {
  local name="$1" limit script="$3"
  limit=$(limit_seconds "$2")
  shift 3
  part "$limit" "$name" "$python" "scripts/$script" --device cuda --json "$out/$name.json" \
    --markdown "$out/$name.md" --plot "$out/$name.png" --max-seconds $((limit > 8 ? limit - 6 : 2)) "$@"
}

workers=(-n 4 --dist worksteal)
"$python" -c 'import xdist' 2>/dev/null || workers=()
# The limits add up to 6 min 50 s. At most thirty kernels are compiled, in four processes if pytest-xdist is there.
part 170 tests "$python" -m pytest -m cuda "${workers[@]}" tests/ops/attention tests/models/test_cuda.py
bench attention-64 50 bench_attention.py --backends triton flex banded flash-attn --dtypes bf16 \
  --lengths 16384 4096 65536 --repeats 5
bench attention-128 35 bench_attention.py --backends triton flex flash-attn --dtypes bf16 --lengths 16384 \
  --head-dim 128 --repeats 5
bench step 80 bench_step.py --rounds 1 --steps 10 --peer-dtypes bf16 --dtypes bf16 \
  --systems memtx x-transformers-640 x-transformers-640-flash compressive-transformer-pytorch
bench step-350m 45 bench_step.py --systems memtx --dtypes bf16 --modes train --rounds 2 --steps 5 --dim 1024 \
  --depth 24 --heads 16 --vocab-size 32768 --batch-size 8 --segment-length 2048
bench stream 30 bench_stream.py --dtypes bf16 --rounds 3
end_parts
