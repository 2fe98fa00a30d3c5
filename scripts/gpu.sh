#!/usr/bin/env bash
# On a machine with a GPU: the CUDA tests, then the benchmarks, within 7 minutes.   scripts/gpu.sh [folder]
# Writes JSON, Markdown and pictures into the folder (runs/gpu by default). MEMTX_PYTHON selects the interpreter, whose
# torch must be a CUDA build. If a part fails, the others still run and the exit code is 1.
set -uo pipefail
cd "$(dirname "$0")/.."
out="${1:-runs/gpu}"
python="${MEMTX_PYTHON:-.venv/bin/python}"
[ -x "$python" ] || python="$(command -v "$python" || command -v python3)"
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "gpu: $python has no torch that sees a GPU; install a CUDA build of torch, or set MEMTX_PYTHON." >&2
  exit 2
fi
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
failed=0

# part SECONDS NAME COMMAND...: run one part with a time limit.
part() {
  local limit="$1" name="$2" began="$SECONDS" code=0
  shift 2
  timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1 || code=$?
  if [ "$name" = tests ] && [ "$code" = 5 ]; then
    echo "$name: no test is marked cuda"
  elif [ "$code" != 0 ]; then
    failed=1
    echo "$name: FAILED with exit code $code (124: exceeded its $limit s) after $((SECONDS - began)) s"
    tail -n 15 "$out/$name.log"
  else
    echo "$name: $((SECONDS - began)) s"
    tail -n 3 "$out/$name.log"
  fi
}

# bench NAME SECONDS SCRIPT OPTIONS...
bench() {
  local name="$1" limit="$2" script="$3"
  shift 3
  part "$limit" "$name" "$python" "scripts/$script" --device cuda --json "$out/$name.json" \
    --markdown "$out/$name.md" --plot "$out/$name.png" "$@"
}

"$python" -c 'import torch; print(torch.cuda.get_device_name(), "torch", torch.__version__)'
cat <<'END'
tests: Triton, flex and banded attention against the float64 reference; a model against the CPU; decoding by graph
       replay against eager steps.
attention-64, -128: windows by memtx's Triton kernel, flex_attention, flash-attn; useful operations per second.
step: training step of memtx against x-transformers and compressive-transformer-pytorch.
step-350m: training step of 350 M parameters, share of the matrix peak.   stream: reading speed and state size.
END
# The limits add up to 6 min 50 s. At most thirty kernels are compiled, in four processes.
part 170 tests "$python" -m pytest -m cuda -n 4 --dist worksteal tests/ops/attention tests/models/test_cuda.py
bench attention-64 50 bench_attention.py --backends triton flex banded flash-attn --dtypes bf16 \
  --lengths 4096 16384 65536 --repeats 5
bench attention-128 35 bench_attention.py --backends triton flex flash-attn --dtypes bf16 --lengths 16384 \
  --head-dim 128 --repeats 5
bench step 80 bench_step.py --rounds 1 --steps 10 --peer-dtypes bf16 --dtypes bf16 \
  --systems memtx x-transformers-640 x-transformers-640-flash compressive-transformer-pytorch
bench step-350m 45 bench_step.py --systems memtx --dtypes bf16 --modes train --rounds 2 --steps 5 --dim 1024 \
  --depth 24 --heads 16 --vocab-size 32768 --batch-size 8 --segment-length 2048
bench stream 30 bench_stream.py --dtypes bf16 --rounds 3
exit "$failed"
