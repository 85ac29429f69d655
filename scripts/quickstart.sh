#!/usr/bin/env bash
# From nothing to a scored model: install, fine-tune a tiny KoGPT2 with pauses under ZeRO-2 on the sample data with two
# ranks, score it, write a sentence. GPUs when there are two, else the CPU.
# usage: bash scripts/quickstart.sh [output folder]         last line: the folder of the exported model
set -euo pipefail
out=${1:-}
case "$out" in "" | /*) ;; *) out="$PWD/$out" ;; esac
cd "$(dirname "$0")/.."
out=${out:-runs/quickstart}
if [ -n "$(ls -A "$out" 2>/dev/null)" ] && [ ! -f "$out/run.json" ]; then
  echo "error: $out holds something else than a run; name another folder" >&2
  exit 2
fi
source scripts/setup.sh
ranks=2
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
[ "$gpus" -ne 1 ] || ranks=1
rm -rf "$out"
port=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
deepspeed --master_port "$port" --num_gpus "$ranks" finetune/train.py finetune/recipes/quickstart.json --output_dir "$out" >&2
python finetune/evaluate.py --model_name_or_path "$out/model" --task nsmc --output_file "$out/evaluation.json" >&2
python finetune/generate.py --model_name_or_path "$out/model" --prompt 긍정 --num_samples 2 >&2
python finetune/generate.py --model_name_or_path "$out/model" --prompt 부정 --num_samples 2 >&2
echo "curves: .venv/bin/tensorboard --logdir $out" >&2
echo "$out/model"
