#!/usr/bin/env bash
# Shows everything on a laptop's CPU in minutes: install, align the miniature with DPO on 2 ranks, train a control on the
# preferred images alone, turn both runs' ZeRO shards into diffusers models, and compare them with the base model.
#   scripts/quickstart.sh                              uses the run folder runs/quickstart
#   scripts/quickstart.sh --flow                       the same with a flow model, shaped like Stable Diffusion 3.5
#   scripts/quickstart.sh runs/other --seed 1          uses another run folder and options of ds_dpo/train.py
# Safe to run again: finished parts stay, an interrupted part resumes.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup_venv.sh requirements/run.txt
trap 'exit 130' INT  # training then saves and exits with status 0, after which the next part would start

preset=miniature run=runs/quickstart pipeline=StableDiffusionXLPipeline
if [ "${1:-}" = --flow ]; then
  preset=miniature_flow run=runs/quickstart_flow pipeline=StableDiffusion3Pipeline
  shift
fi
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then
  run=$1
  shift
fi
model=ds_dpo://assets/$preset/model
started=$(date +%s)

# CPUs without bf16 of their own convert for each product and take several times as long as in fp32
deepspeed_config=zero2_bf16
if [ "$DS_ACCELERATOR" = cpu ] && [ "$(python -c "
from ds_dpo.distributed.half_precision import faster_on_cpu
print(faster_on_cpu('bf16'))")" = fp32 ]; then
  deepspeed_config=zero2_fp32_cpu
fi

train() {
  deepspeed --log_level error --num_accelerators 2 --master_port "$(free_port)" ds_dpo/train.py --config "$preset" \
    --deepspeed_config "$deepspeed_config" "$@"
}

free_port() {
  python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

echo "== 1/4 DPO on preference pairs: 2 ranks, ZeRO-2, ${deepspeed_config#zero2_} (2 to 3 minutes)"
# every 75 steps it is evaluated on held-out pairs; healthy runs of such a small model double the preferred images' error
train --output_dir "$run" --held_out.every_steps 75 --held_out.split validation_unique --held_out.num_pairs 44 \
  --watchdog.max_rise 2 "$@"
echo "== 2/4 the control: the same pairs, steps and rate, but only the preferred images (about 1 minute)"
train --output_dir "${run}_sft" --objective.type sft "$@"
echo "== 3/4 ZeRO shards to diffusers pipelines"
for each in "$run" "${run}_sft"; do
  python scripts/consolidate.py "$each" "$each/export" --format pipeline
done
echo "== 4/4 the same prompts and seeds for base, control and tuned model"
python scripts/evaluate.py --base "$model" --tuned "$run/export" --sft "${run}_sft/export" --out "$run/evaluation"

cat <<END

model        $run/export        (diffusers: $pipeline.from_pretrained)
page         $run/evaluation/page.html   (win rates, gallery, blind votes)
picture      $run/evaluation/grid.png
numbers      $run/evaluation/summary.json
curves       .venv/bin/tensorboard --logdir runs/
held out     $run/evaluation/held_out.jsonl
log          $run/log.txt
done in $(( $(date +%s) - started )) s, after installation
END
