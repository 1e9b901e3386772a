#!/usr/bin/env bash
# The whole journey with a tiny model, on two CPU cores or two GPUs:
# pack, check, plan, train, preempt, resume, evaluate, caption, report, export, publish (a rehearsal).
#   bash docs/journey.sh [PICTURES]     a folder of pictures with .txt side-cars; drawings if there is none
# Everything is written to ./journey; STEPS sets the length of the run.
set -euo pipefail
export OMP_NUM_THREADS=1 DS_SKIP_CUDA_CHECK=1
PICTURES=${1:-journey/pictures}
say() { printf '\n== %s\n' "$*"; }

if [ $# = 0 ]; then
  say "draw 2,000 pictures with a sentence each"
  mkdir -p journey/pictures
  python - <<'PYTHON'
from coca_scale.data.synthetic import Shapes

for number, drawing in enumerate(Shapes(count=2000, size=48, split="train")[i] for i in range(2000)):
    drawing.image.save(f"journey/pictures/{number:04d}.png")
    with open(f"journey/pictures/{number:04d}.txt", "w") as file:
        file.write(drawing.captions[0][0])
PYTHON
fi

say "pack them into shards, every 20th picture held out"
coca-scale data pack "$PICTURES" --out journey/shards --hold-out 20
coca-scale data inspect journey/shards/train --picture journey/lengths.png

RECIPE=(recipes/tiny.yaml run.dir=journey/run data.train=journey/shards/train data.val=journey/shards/val
  data.lanes=8 train.steps="${STEPS:-400}" checkpoint.every_steps=50 eval.every_steps=200 eval.scored_captions=32)
say "check recipe, data and memory; plan time and cost on other machines"
coca-scale check "${RECIPE[@]}" --gpus 2
coca-scale plan "${RECIPE[@]}" --gpus 2 --gpu h100-80gb

train() { deepspeed --num_gpus 2 coca_scale/train.py --recipe "${RECIPE[@]}" >> journey/train.log 2>&1; }
say "train (journey/train.log), and be preempted after the first checkpoint"
train &
job=$!
until [ -e journey/run/checkpoints/latest ]; do
  kill -0 "$job" || { tail -n 20 journey/train.log; exit 1; }
  sleep 1
done
pkill -USR1 -f 'train.py --local_rank=0 .*run.dir=journey/run'    # what SLURM sends before the time limit
wait "$job" && code=0 || code=$?
tail -n 3 journey/train.log
[ "$code" != 0 ] || { echo "the run was complete before the signal came"; exit 1; }

say "resume with the same command, to the end"
train
grep -E 'resumed|finished' journey/train.log

say "evaluate on the pictures that were held out"
coca-scale eval retrieval journey/run journey/shards/val --equal-captions --out journey/retrieval.json
coca-scale eval captioning journey/run journey/shards/val --min-length 0 --out journey/captioning.json

say "caption them"
coca-scale caption journey/run journey/shards/val --min-length 0 --out journey/captions.jsonl --picture journey/captions.png
head -n 3 journey/captions.jsonl

say "one page about the run"
coca-scale report journey/run --out journey/report.html

say "export to OpenCLIP, and compare"
coca-scale export journey/run --out journey/export --verify

say "rehearse publishing"
coca-scale publish journey/run --repo my-name/coca-journey --licence mit --dry-run \
  --scores journey/retrieval.json --scores journey/captioning.json

say "done: look at journey/captions.png and journey/report.html"
