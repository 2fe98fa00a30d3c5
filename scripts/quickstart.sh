#!/usr/bin/env bash
# The main job, start to end: train on the texts that every CPython carries, read a text the model has not seen,
# write a few lines, draw the picture. A second run goes on where the first one stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
run=runs/quickstart
echo "== Training a byte-level model on the embedded text (minutes on 2 cores) into $run"
.venv/bin/memtx fit --config configs/quickstart.yaml --ckpt_path last
# A text that is in no training set: the licence beside this script.
echo "== Reading LICENSE, which it has not seen"
.venv/bin/memtx read LICENSE --checkpoint "$run" --report-every 4000 --plot "$run/reading.png"
echo "== Going on from a prompt"
.venv/bin/memtx generate --checkpoint "$run" --prompt "The import statement " --max-tokens 300 --temperature 0.7 --seed 0
echo
echo "== The picture: $run/reading.png; the figures: $run/metrics.csv; TensorBoard: .venv/bin/tensorboard --logdir runs"
