# Parts of gpu.sh and gpu_memory.sh, each with a time limit of its own: one that fails stops no other. To be sourced.

# begin_parts FOLDER SECONDS: choose the interpreter, create the folder, and set the time within which all parts end.
begin_parts() {
  out="$1"
  end=$((SECONDS + $2))
  failed=0
  python="${MEMTX_PYTHON:-.venv/bin/python}"
  [ -x "$python" ] || python="$(command -v "$python" || command -v python3)"
  export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
  mkdir -p "$out"
  : >"$out/parts.jsonl"
}

# require_gpu: print the GPU's name, or exit.
require_gpu() {
  if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "gpu: $python has no torch that sees a GPU; install a CUDA build of torch, or set MEMTX_PYTHON." >&2
    exit 2
  fi
  "$python" -c 'import torch; print(torch.cuda.get_device_name(), "torch", torch.__version__)'
}

# limit_seconds SECONDS: print the limit of a part that begins now; two seconds are left for one that has to be killed.
limit_seconds() {
  echo $(($1 < end - SECONDS - 2 ? $1 : end - SECONDS - 2))
}

# part SECONDS NAME COMMAND...: run one part; its output goes to NAME.log, its result to parts.jsonl.
part() {
  local limit name="$2" began="$SECONDS" code=0
  limit=$(limit_seconds "$1")
  shift 2
  if [ "$limit" -gt 0 ]; then
    timeout --kill-after=2 "$limit" "$@" >"$out/$name.log" 2>&1 || code=$?
  else
    code=124
    echo "no time was left" >"$out/$name.log"
  fi
  echo "{\"part\": \"$name\", \"exit_code\": $code, \"seconds\": $((SECONDS - began))}" >>"$out/parts.jsonl"
  if [ "$code" = 0 ]; then
    echo "$name: $((SECONDS - began)) s"
    tail -n 3 "$out/$name.log"
  else
    failed=1
    echo "$name: FAILED with exit code $code (124: exceeded its $limit s) after $((SECONDS - began)) s"
    tail -n 15 "$out/$name.log"
  fi
}

# end_parts: print the tables and exit with 1 if a part failed.
end_parts() {
  for table in "$out"/*.md; do
    [ ! -e "$table" ] || { echo && cat "$table"; }
  done
  exit "$failed"
}
