#!/usr/bin/env bash
# Runs all speed measurements and tests that need a GPU, the most informative ones first, and writes
# the results to one folder. Takes an estimated half hour on an H100.
#   benchmarks/gpu.sh OUT [IMAGES]
# IMAGES is an image folder or archive of JPEGs, and adds the rates of training from these files. If
# CIFAR10 is a folder with the images of CIFAR-10, the loss curves are on these, otherwise on
# synthetic images. Results are written after each part, so an interruption loses only the current
# part. PARTS="tests train_s" runs only the named parts.
set -uo pipefail
out=$(realpath -m "${1:?usage: benchmarks/gpu.sh OUT [IMAGES]}")
images=${2:+$(realpath "$2")}
curve=(--data synthetic --train.epochs 60 --optim.warmup-epochs 15) # 300 steps
if [ -n "${CIFAR10:-}" ]; then
    curve=(--data "$(realpath "$CIFAR10")" --train.epochs 4 --optim.warmup-epochs 1) # 391
fi
mkdir -p "$out"
cd "$(dirname "$0")/.." || exit

part() { # NAME COMMAND...: runs a part, prints and stores its output, and continues after failures
    local name=$1
    shift
    [[ -z ${PARTS:-} || " $PARTS " == *" $name "* ]] || return 0
    echo "== $name: $*"
    "$@" 2>&1 | tee "$out/$name.txt"
    echo "exit ${PIPESTATUS[0]}, ${SECONDS} s since the start" | tee -a "$out/$name.txt"
}

measure() { # NAME ARGUMENTS...: compares with timm, and writes JSON as well
    part "$1" python benchmarks/throughput.py --json "$out/$1.json" "${@:2}"
}

# Only files with GPU tests, as others may need packages that the machine lacks. Warnings are not
# errors here, as they depend on the machine's software.
mapfile -t files < <(grep -rl --include='*.py' 'mark\.gpu' tests | sort)
part tests python -m pytest -m gpu -q -W default --durations=5 "${files[@]}"
part blocks python benchmarks/blocks.py "$out/blocks.json"
measure train_s --sizes s --batch 512
measure train_b --sizes b --batch 256
measure infer_b --sizes b --batch 512 --mode infer --peers timm timm-rope
measure profile_s --sizes s --batch 512 --profile vitral
for kernels in auto plain; do # loss curves with both
    part "curve_$kernels" python -m vitral train cifar10 "${curve[@]}" --out "$out/curve_$kernels" \
        --model.kernels $kernels --train.log-every 10
done
measure train_l --sizes l --batch 128
measure memory --sizes l/16 h/14 --largest-batch --peers --compile never
measure cifar10 --recipe cifar10 --peers timm timm-rope
measure profile_b --sizes b --batch 256 --profile vitral
if [ -n "$images" ]; then
    part data python -m vitral bench data "$images" imagenet-b16-300ep
    part training_b python -m vitral bench train imagenet-b16-300ep --data "$images"
    part training_s python -m vitral bench train imagenet-s16-90ep --data "$images"
fi
