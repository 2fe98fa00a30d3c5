#!/usr/bin/env bash
# The main workflow: train on texts that come with CPython, read an unseen text, plot its surprisal and generate a few
# lines. A second run resumes where the first one stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
run=runs/quickstart
echo "== Training a byte-level model on the texts of CPython (minutes on 2 cores) into $run"
.venv/bin/memtx fit --config configs/quickstart.yaml --ckpt_path last
# This license is not part of the training texts.
echo "== Reading LICENSE, an unseen text"
.venv/bin/memtx read LICENSE --checkpoint "$run" --report-every 4000 --plot "$run/reading.png"
echo "== Generating from a prompt"
.venv/bin/memtx generate --checkpoint "$run" --prompt "The import statement " --max-tokens 300 --temperature 0.7 --seed 0
echo
echo "== Plot: $run/reading.png; metrics: $run/metrics.csv; TensorBoard: .venv/bin/tensorboard --logdir runs"
