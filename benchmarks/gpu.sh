#!/usr/bin/env bash
# What there is to measure on a GPU, in parts of under ten minutes: `make gpu`, or
#   PYTHON=python3 bash benchmarks/gpu.sh tests|compiled|fp8|large|small|runs|pictures|loader [FOLDER]
# Rows and logs go to FOLDER (default runs/gpu); each case has a process and a time limit of its own.
set -uo pipefail

PART=${1:-all}
OUT=${2:-runs/gpu}
PYTHON=${PYTHON:-python}
mkdir -p "$OUT"
export DS_SKIP_CUDA_CHECK=1 PYTORCH_ALLOC_CONF=expandable_segments:True TOKENIZERS_PARALLELISM=false
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

chosen() { # tests whose names fit
  echo "== $*"
  DS_ACCELERATOR=cuda timeout "${LIMIT:-240}" "$PYTHON" -m pytest -q -s -m gpu tests -k "$*" >"$OUT/test.log" 2>&1
  cat "$OUT/test.log" >>"$OUT/tests.log"
  grep -vE '^$|^\[|^(step|saved) ' "$OUT/test.log" | tail -40
}

tests() { # three minutes
  LIMIT=400 chosen not blocks
}

compiled() { # what waits for torch.compile; eight minutes
  chosen blocks and float64
  chosen blocks and curve and bf16
  chosen blocks and curve and fp32
  chosen blocks and curve and fp16
  chosen blocks and resumed
  chosen blocks and waits
  LIMIT=240 step "$COMPILED" --batch 96 --accumulation 4
}

fp8() { # engine.fp8: tests, an L/14 beside its step in bf16, and the layers of coca_2b; eight minutes
  chosen fp8
  step "$COMPILED" --batch 384
  step "$COMPILED" --batch 384 engine.fp8=true --profile "$OUT/fp8.txt"
  step engine.fp8=true
  LIMIT=200 step "$COMPILED" --model coca_2b --batch 32
  LIMIT=200 step "$COMPILED" --model coca_2b --batch 32 engine.fp8=true --profile "$OUT/fp8_2b.txt"
}

large() { # eight minutes on an H100; where memory allows more, larger batches are faster
  step "$KEEP" "$COMPILED" --profile "$OUT/compiled.txt"
  step "$COMPILED" --batch 384 --profile "$OUT/compiled384.txt"
  step "$COMPILED" --model ViT-L-14 --batch 384
  step "$KEEP" "$COMPILED" --model ViT-L-14
  step "$KEEP"
  step --open-clip pure_bf16
  step --open-clip pure_bf16 --compile
  step --open-clip pure_bf16 --compile --model ViT-L-14 --batch 256
}

small() { # six minutes
  step "$COMPILED" --model coca_ViT-B-32 --batch 2048
  step "$KEEP" --model coca_ViT-B-32 --batch 512
  step "$COMPILED" --model ViT-B-32 --batch 2048
  step --open-clip pure_bf16 --model coca_ViT-B-32 --batch 512
  step --open-clip pure_bf16 --model ViT-B-32 --batch 2048
  timeout 90 "$PYTHON" benchmarks/losses.py --out "$OUT/losses.json"
  timeout 120 "$PYTHON" benchmarks/generation.py --models ViT-L-14 --out "$OUT/generation.json"
}

# a run of tiny.yaml that is killed after step $2 and resumed, to its end: NAME STEP OVERRIDES...
killed() {
  local folder=$OUT/$1 log=$OUT/$1.log step=$2 give_up=$((SECONDS + 150))
  local train=("$PYTHON" coca_scale/train.py --recipe recipes/tiny.yaml "run.dir=$folder" engine.precision=bf16
    train.micro_batch=64 data.workers=8 checkpoint.every_steps=100 eval.scored_captions=0 "${@:3}")
  rm -rf "$folder"
  "${train[@]}" >"$log" 2>&1 &
  until grep -q "^step $step/" "$log" || ! kill -0 $! 2>/dev/null || ((SECONDS > give_up)); do sleep 0.2; done
  kill -9 $! || echo "ended before step $step"
  wait $! 2>/dev/null
  timeout "${LIMIT:-400}" "${train[@]}" >>"$log" 2>&1 || { echo "failed, exit code $?"; tail -5 "$log"; }
  grep -E '^(resumed|validation|finished|coca-scale:)' "$log"
}

runs() { # two and a half minutes, on drawings; then how good the model is
  local held_out='synthetic://shapes?split=val&count=256&size=48'
  killed drawings 250 eval.every_steps=1000
  timeout 60 "$PYTHON" -m coca_scale eval captioning "$OUT/drawings" "$held_out"
  timeout 60 "$PYTHON" -m coca_scale eval retrieval "$OUT/drawings" "$held_out" --equal-captions
}

pictures() { # the same on real ones, compiled: $PICTURES has shards in train/ and val/, as docs/evaluation.md packs stamps
  : "${PICTURES:?names a folder with shards in train/ and val/}"
  killed pictures 150 "$COMPILED" "data.train=$PICTURES/train" "data.val=$PICTURES/val" model.image_size=64 \
    model.context_length=40 data.crop_scale_min=0.8 "train.epochs=${EPOCHS:-40}" eval.every_steps=null
  timeout 60 "$PYTHON" -m coca_scale eval captioning "$OUT/pictures" "$PICTURES/val"
  timeout 60 "$PYTHON" -m coca_scale eval retrieval "$OUT/pictures" "$PICTURES/val"
}

loader() { # a minute: images per second of cores, and how long steps of a GPU wait for them
  timeout 90 "$PYTHON" benchmarks/loader.py --rounds 3 --workers 1 4 8 16 --out "$OUT/loader.json"
  timeout 120 "$PYTHON" benchmarks/loader_share.py --workers 0 4 16 --out "$OUT/loader_share.json"
}

case $PART in
  tests | compiled | fp8 | large | small | runs | pictures | loader) "$PART" ;;
  all)
    for part in tests compiled fp8 large small runs loader ${PICTURES:+pictures}; do bash "$0" "$part" "$OUT"; done ;;
  *) echo "usage: bash benchmarks/gpu.sh tests|compiled|fp8|large|small|runs|pictures|loader [FOLDER]" >&2; exit 2 ;;
esac
