#!/usr/bin/env bash
# What there is to measure on a GPU, in parts of under ten minutes: `make gpu`, or
#   PYTHON=python3 bash benchmarks/gpu.sh tests|large|small|runs [FOLDER]
# Rows and logs go to FOLDER (default runs/gpu); each case has a process and a time limit of its own.
set -uo pipefail

PART=${1:-all}
OUT=${2:-runs/gpu}
PYTHON=${PYTHON:-python}
mkdir -p "$OUT"
export DS_SKIP_CUDA_CHECK=1 PYTORCH_ALLOC_CONF=expandable_segments:True TOKENIZERS_PARALLELISM=false
TRITON=loss.caption_kernel=triton
KEEP=engine.activation_checkpointing=none
COMPILED=engine.compile=blocks

step() { # one case of the table
  echo "== $*"
  timeout "${LIMIT:-120}" "$PYTHON" benchmarks/engine_step.py --warm 5 "$@" --out "$OUT/steps.jsonl" >"$OUT/step.log" 2>&1 ||
    { echo "failed, exit code $?"; tail -5 "$OUT/step.log"; return; }
  tail -1 "$OUT/steps.jsonl" | "$PYTHON" -c '
import json, sys
row = json.loads(sys.stdin.read())
print("{:.1f} ms  {:.0f} samples/s  MFU {:.1%}  peak {:.1f} GB".format(
    1e3 * row["step_seconds"], row["samples_per_second"], row.get("mfu", 0), row.get("peak_bytes", 0) / 1e9))'
}

tests() {
  DS_ACCELERATOR=cuda timeout 580 "$PYTHON" -m pytest -q -s -m gpu tests | tee "$OUT/tests.log" | tail -40
}

large() { # eight minutes on an H100; where memory allows more, larger batches are faster
  step "$TRITON" "$KEEP" "$COMPILED" --profile "$OUT/compiled.txt"
  step "$TRITON" "$COMPILED" --batch 384 --profile "$OUT/compiled384.txt"
  step "$COMPILED" --model ViT-L-14 --batch 384
  step "$KEEP" "$COMPILED" --model ViT-L-14
  step "$TRITON" "$KEEP"
  step --open-clip pure_bf16
  step --open-clip pure_bf16 --compile
  step --open-clip pure_bf16 --compile --model ViT-L-14 --batch 256
  step "$TRITON" "$COMPILED" --batch 96 --accumulation 4
}

small() { # six minutes
  step "$TRITON" "$COMPILED" --model coca_ViT-B-32 --batch 2048
  step "$TRITON" "$KEEP" --model coca_ViT-B-32 --batch 512
  step "$COMPILED" --model ViT-B-32 --batch 2048
  step --open-clip pure_bf16 --model coca_ViT-B-32 --batch 512
  step --open-clip pure_bf16 --model ViT-B-32 --batch 2048
  timeout 90 "$PYTHON" benchmarks/losses.py --out "$OUT/losses.json"
  timeout 120 "$PYTHON" benchmarks/generation.py --models ViT-L-14 --out "$OUT/generation.json"
}

runs() { # drawings: killed after step 250, resumed, to the end; then how good it is
  local folder=$OUT/drawings held_out='synthetic://shapes?split=val&count=256&size=48'
  local train=("$PYTHON" coca_scale/train.py --recipe recipes/tiny.yaml "run.dir=$folder" engine.precision=bf16
    "$TRITON" train.micro_batch=64 data.workers=8 checkpoint.every_steps=100 eval.every_steps=1200
    eval.scored_captions=0)
  rm -rf "$folder"
  "${train[@]}" >"$OUT/train.log" 2>&1 &
  until grep -q '^step 250/' "$OUT/train.log" || ! kill -0 $! 2>/dev/null; do sleep 0.2; done
  kill -9 $!
  timeout 400 "${train[@]}" >>"$OUT/train.log" 2>&1
  grep -E '^(resumed|validation|finished|coca-scale:)' "$OUT/train.log"
  timeout 60 "$PYTHON" -m coca_scale eval captioning "$folder" "$held_out"
  timeout 60 "$PYTHON" -m coca_scale eval retrieval "$folder" "$held_out" --equal-captions
}

case $PART in
  tests | large | small | runs) "$PART" ;;
  all) for part in tests large small runs; do bash "$0" "$part" "$OUT"; done ;;
  *) echo "usage: bash benchmarks/gpu.sh tests|large|small|runs [FOLDER]" >&2; exit 2 ;;
esac
