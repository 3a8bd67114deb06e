#!/usr/bin/env bash
# bash evidence/gpu.sh          what only a GPU shows, in at most 8 minutes, on one GPU, without a network;
#                               prints tables, keeps them in results/gpu/, exits with 1 where something is off
# bash evidence/gpu.sh --dry    all of it on a CPU, at toy sizes, kept nowhere
# ASGA_DATA: a folder with cifar10/train/CLASS/*, else it makes pictures. PYTHON=… chooses the interpreter.
# Whatever was printed stays valid where it is stopped.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python} dry=${1:-} out=results/gpu off=0
tests=cuda benches=("resnet18 64 128 bf16" "resnet18 224 256 bf16" "mobilenet_v2 64 128 float32"
                    "resnet50 224 128 bf16" "mobilenet_v2 224 128 bf16") rounds=10
if [ "$dry" ]; then
  out=$(mktemp -d) tests="replayed and handmade" benches=("resnet20 16 4 float32") rounds=1
fi
mkdir -p "$out"

part() {  # seconds at most, command
  local left=$((475 - SECONDS))
  echo "== after $SECONDS s: ${*:2}"
  timeout $((left < $1 ? left : $1)) "${@:2}" || { echo "== OFF (exit code $?): ${*:2}"; off=1; }
}

{
  part 60 "$python" evidence/gpu.py search $dry
  for bench in "${benches[@]}"; do
    read -r arch px batch precision <<<"$bench"
    part 90 "$python" evidence/bench.py --arch "$arch" --resolution "$px" --batch-size "$batch" \
      --precision "$precision" --rounds "$rounds" --out "$out/$arch-$px-$precision.json"
  done
  part 90 "$python" evidence/gpu.py nan $dry
  part 180 "$python" -m pytest -q test_asga.py -p no:cacheprovider -k "$tests"
  exit $off
} 2>&1 | tee "$out/gpu.txt"
