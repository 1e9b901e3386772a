#!/usr/bin/env bash
# `make demo`: train a small CoCa with ZeRO-3, caption held-out pictures, export, reload in open_clip.
set -euo pipefail

RUN=${RUN:-runs/demo}
HELD_OUT='synthetic://shapes?split=val&count=256&size=48'
export DS_SKIP_CUDA_CHECK=1 OMP_NUM_THREADS=1
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
ranks=2
precision=fp32
if [ "$gpus" -gt 0 ]; then
  precision=bf16
  ranks=$((gpus < 2 ? 1 : 2))
fi

rm -rf "$RUN"
mkdir -p "$RUN"
echo "training on $ranks processes (all messages: $RUN/train.log)"
deepspeed --num_gpus "$ranks" coca_scale/train.py --recipe recipes/tiny.yaml \
  run.name=demo run.dir="$RUN" engine.precision="$precision" \
  2>&1 | tee "$RUN/train.log" | grep --line-buffered -E '^(step |validation |  «|finished |resumed |coca-scale: )'

echo "captioning 256 held-out pictures, and measuring it"
coca-scale caption "$RUN" "$HELD_OUT" --out "$RUN/captions.jsonl" --picture "$RUN/captions.png"
coca-scale eval retrieval "$RUN" "$HELD_OUT" --equal-captions
coca-scale eval captioning "$RUN" "$HELD_OUT"
echo "exporting to OpenCLIP"
coca-scale export "$RUN" --out "$RUN/export" --verify

echo
echo "picture   $RUN/captions.png"
echo "metrics   $RUN/metrics.jsonl   (TensorBoard: tensorboard --logdir $RUN)"
echo "model     $RUN/export"
