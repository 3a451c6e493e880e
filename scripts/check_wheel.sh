#!/usr/bin/env bash
# Builds the wheel, installs it into a new environment without a checkout in sight, and walks a user's path there on a
# CPU: help, four steps of the miniature, a resume to six, an export, an image.
#   scripts/check_wheel.sh                      installs all requirements into the new environment
#   scripts/check_wheel.sh --with SITE_PACKAGES takes the requirements from another environment's site-packages
set -euo pipefail
cd "$(dirname "$0")/.."

others=
if [ "${1-}" = --with ]; then
  others=$2
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/source"
cp -r ds_dpo ds_configs setup.py pyproject.toml README.md "$work/source"  # a build leaves folders beside its sources

python -m venv "$work/venv"
if [ -n "$others" ]; then
  echo "$others" > "$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/others.pth"
  python -m pip wheel -q --no-deps --no-build-isolation -w "$work" "$work/source"
  "$work/venv/bin/pip" install -q --no-deps "$work"/ds_dpo-*.whl
else
  "$work/venv/bin/pip" wheel -q --no-deps -w "$work" "$work/source"
  "$work/venv/bin/pip" install -q "$work"/ds_dpo-*.whl
fi
rm -r "$work/source"
unset PYTHONPATH
export PATH="$work/venv/bin:$PATH" DS_ACCELERATOR=cpu
mkdir "$work/my folder"  # a blank in the path: printed commands are quoted
cd "$work/my folder"

python -c 'import ds_dpo, sys; assert ds_dpo.__file__.startswith(sys.prefix), ds_dpo.__file__'
ds-dpo --help
ds-dpo --version
train=(ds-dpo train --config miniature --deepspeed_config zero2_fp32_cpu --output_dir "a run" --pairs_per_step 4
  --micro_batch_pairs 4 --schedule.name constant --warmup_steps 0 --cadence.sample_every_steps none
  --cadence.log_every_steps 1)
"${train[@]}" --max_train_steps 4
"${train[@]}" --max_train_steps 6 | tee resumed.txt
grep -q "resumed from step 4" resumed.txt
grep -q "ds-dpo consolidate 'a run'" resumed.txt
ds-dpo consolidate "a run" exported --format pipeline --dtype fp32
ds-dpo generate --model exported --prompt "a red circle on a white background" --steps 2 --out drawn
test -s drawn/grid.png
python -m ds_dpo data-stats --config miniature --data.max_rows 20
echo "check_wheel: all well"
