#!/usr/bin/env bash
# What a machine with a GPU shows in one command, without a package registry: the laws of all engines on CUDA, memory
# beside the plan, the speed of a training step beside the machine's limit and beside other trainers.
# usage: bash scripts/gpu_check.sh [--quick | --rehearse] OUTPUT [PART ...]      parts: see below; default: all
#   --quick             one micro batch of each model, few updates
#   --rehearse          the same commands on the CPU with tiny shapes: does the script itself work?
#   WHEELS=FOLDER       wheels of what the machine lacks; they are installed into OUTPUT/site
#   NSMC=FILE           NSMC's ratings_train.txt in place of the sample reviews
#   PYTHON=python3.12   the interpreter that has PyTorch
#   KOZERO_DEVICE=cpu   hides the GPUs
#   SECONDS_A_PART=900  a part that takes longer has failed
# Each part writes OUTPUT/PART.log and OUTPUT/PART.json. exit: 0 all passed, 1 a part failed, 2 nothing could be run
set -uo pipefail

stop() { echo "error: $1" >&2; exit 2; }

all="laws laws_slow kogpt2 kogpt2_packed kogpt2_compiled kogpt2_fp16 kogpt2_zero2 trinity trinity_packed"
all="$all trinity_compiled trinity_frozen targets nsmc korquad nsmc_best korquad_best optimizer checkpoints"
quick="" rehearse=""
while [[ "${1:-}" == --* ]]; do
  case "$1" in
    --quick) quick=yes ;;
    --rehearse) rehearse=yes ;;
    *) stop "$1: unknown; --quick, --rehearse" ;;
  esac
  shift
done
[ $# -ge 1 ] || stop "name a folder for the results: bash scripts/gpu_check.sh OUTPUT"
case "$1" in /*) out=$1 ;; *) out=$PWD/$1 ;; esac
shift
parts=${*:-$all}
for part in $parts; do
  case " $all " in *" $part "*) ;; *) stop "$part: no such part; the parts are $all" ;; esac
done
wheels=${WHEELS:+$(realpath "$WHEELS")} nsmc=${NSMC:+$(realpath "$NSMC")}
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
[ -z "$rehearse" ] && [ "${KOZERO_DEVICE:-}" != cpu ] || export CUDA_VISIBLE_DEVICES=
export PYTHONPATH=$PWD:$out/site${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

if [ -n "$wheels" ]; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$out/site" \
    "$wheels"/*.whl || stop "WHEELS=$wheels: cannot be installed"
fi
lacking=$("$python" - << 'EOF'
from importlib.util import find_spec

needed = ["torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy", "filelock", "psutil", "tqdm"]
needed += ["tensorboard", "deepspeed", "hjson", "pydantic", "fairscale", "pytest", "hypothesis"]
print(*(name for name in needed if find_spec(name) is None))
EOF
) || stop "$python does not run"
[ -z "$lacking" ] || stop "$python lacks $lacking; bring wheels and name their folder with WHEELS"
"$python" -W ignore - << 'EOF'
import importlib.metadata, platform, torch

print(f"Python {platform.python_version()}, {platform.platform()}")
names = ("torch", "transformers", "accelerate", "deepspeed", "fairscale", "numpy")
print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in names) + f", CUDA {torch.version.cuda}")
for k in range(torch.cuda.device_count()):
    device = torch.cuda.get_device_properties(k)
    print(f"GPU {k}: {device.name}, {device.total_memory / 2**30:.0f} GiB, capability {device.major}.{device.minor}")
EOF
if [ -z "$rehearse" ]; then
  "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    stop "no GPU is visible; --rehearse goes through all parts on the CPU with tiny shapes"
fi

mkdir -p "$out" || exit 2
step="--length 1024 --profile" kogpt2=models/kogpt2_config.json trinity=models/ko_gpt_trinity_config.json
large=16,32,64 middle=32 small=8,16,32 few=16 bottom=wte,wpe,h.0-11 row=1024
laws="tests/test_cuda.py tests/test_engines.py"
laws="$laws tests/test_footprint.py::test_the_prediction_is_within_a_tenth_of_a_gpus_peak"
seldom="-m slow tests/test_engines.py"  # engines that are near another one
texts=448 batch=128 questions=224 beside="--rounds 5" sides=kozero,padded,dynamic,grouped
! "$python" -c 'import trl' 2> /dev/null || sides=$sides,packed
best='"torch_compile": true, "dataloader_num_workers": 2' attention=sdpa  # what a user of the others would switch on
! "$python" -c 'from liger_kernel.transformers import monkey_patch; monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN["gpt2"]' \
  2> /dev/null || best="$best, \"use_liger_kernel\": true"  # version 0.5 knows no GPT-2, and would do nothing
! "$python" -c 'import flash_attn' 2> /dev/null || attention=flash_attention_2
best=(--torch_compile --peer_arguments "{$best}" --peer_attention "$attention")
[ -z "$nsmc" ] || texts=16384 batch=1024
if [ -n "$quick" ]; then
  large=32 small=16 step="$step --updates 5 --rounds 3" laws=tests/test_cuda.py beside="--rounds 2"
fi
if [ -n "$rehearse" ]; then
  kogpt2=models/tiny_config.json trinity=$kogpt2 large=1,2 middle=1 small=1 few=1 bottom=wte,wpe,h.0 laws=tests/test_cuda.py
  seldom=tests/test_cuda.py
  step="--length 32 --profile --updates 1 --rounds 1" beside="--rounds 1 --config_file $kogpt2"
  texts=8 batch=8 questions=4 row=512 sides=kozero,padded
fi

limited() { timeout -k 10 "${SECONDS_A_PART:-900}" "$python" -W ignore "$@"; }

# words of $step, $laws, $seldom and $beside are to be split
step() { limited benchmarks/step.py $step "$@" --output_file "$out/$part.json"; }

beside() { limited benchmarks/finetuning.py $beside --bf16 --sides "$sides" "$@" --output_file "$out/$part.json"; }

reviews() { beside --task nsmc ${nsmc:+--train_file "$nsmc"} --texts $texts --batch_size $batch --row_length $row "$@"; }

passages() { beside --task korquad --texts $questions --batch_size 16 --length 384 --row_length $((row * 3 / 4)) "$@"; }

run() {
  case "$1" in
    laws) limited -m pytest -q -rs -p no:cacheprovider --junitxml "$out/laws.xml" $laws ;;
    laws_slow) limited -m pytest -q -rs -p no:cacheprovider --junitxml "$out/$part.xml" $seldom ;;
    kogpt2) step --config_file $kogpt2 --bf16 --micro_batch $large ;;
    kogpt2_packed) step --config_file $kogpt2 --bf16 --micro_batch $middle --packed 16 ;;
    kogpt2_compiled) step --config_file $kogpt2 --bf16 --micro_batch $middle --torch_compile ;;
    kogpt2_fp16) step --config_file $kogpt2 --fp16 --micro_batch $middle ;;
    kogpt2_zero2) step --config_file $kogpt2 --bf16 --micro_batch $middle --deepspeed_config ds_configs/zero2.json ;;
    trinity) step --config_file $trinity --bf16 --micro_batch $small ;;
    trinity_packed) step --config_file $trinity --bf16 --micro_batch $few --packed 16 ;;
    trinity_compiled) step --config_file $trinity --bf16 --micro_batch $few --torch_compile ;;
    trinity_frozen) step --config_file $trinity --bf16 --micro_batch $small --freeze $bottom ;;
    targets) limited benchmarks/targets.py --folder "$out" --output_file "$out/$part.json" ;;
    nsmc) reviews ;;
    korquad) passages ;;
    nsmc_best) reviews "${best[@]}" ;;
    korquad_best) passages "${best[@]}" ;;
    optimizer) limited benchmarks/optimizer.py --config_file $kogpt2 --output_file "$out/$part.json" ;;
    checkpoints) limited benchmarks/checkpoints.py --config_file $kogpt2 --output_file "$out/$part.json" ;;
  esac
}

summary=()
failed=0
for part in $parts; do
  echo "== $part"
  began=$SECONDS
  if run "$part" 2>&1 | tee "$out/$part.log"; then
    summary+=("$part: passed, $((SECONDS - began)) s")
  else
    summary+=("$part: FAILED with exit code ${PIPESTATUS[0]}, $((SECONDS - began)) s, see $out/$part.log")
    failed=1
  fi
done
echo "== summary"
printf '%s\n' "${summary[@]}" | tee "$out/summary.txt"
exit $failed
