#!/usr/bin/env bash
# Every figure of speed that needs a GPU, and the tests that need one, into one folder, in the order
# of what tells most; about half an hour of an H100, by estimate.
#   benchmarks/gpu.sh OUT [IMAGES]
# IMAGES is an image folder or archive of JPEGs, and adds the rates of whole training from it. CIFAR10
# names a folder with its images, for the loss curves; without it they are of synthetic ones. Each
# part is kept when it ends, so that a run cut short loses only the part that it was in; PARTS="tests
# train_s" takes some of them alone.
set -uo pipefail
out=$(realpath -m "${1:?usage: benchmarks/gpu.sh OUT [IMAGES]}")
images=${2:+$(realpath "$2")}
curve=(--data synthetic --train.epochs 60 --optim.warmup-epochs 15) # 300 steps
if [ -n "${CIFAR10:-}" ]; then
    curve=(--data "$(realpath "$CIFAR10")" --train.epochs 4 --optim.warmup-epochs 1) # 391
fi
mkdir -p "$out"
cd "$(dirname "$0")/.." || exit

part() { # NAME COMMAND...: prints, keeps what was printed, and goes on after a failure
    local name=$1
    shift
    [[ -z ${PARTS:-} || " $PARTS " == *" $name "* ]] || return 0
    echo "== $name: $*"
    "$@" 2>&1 | tee "$out/$name.txt"
    echo "exit ${PIPESTATUS[0]}, ${SECONDS} s since the start" | tee -a "$out/$name.txt"
}

measure() { # NAME ARGUMENTS...: a contest, with its JSON
    part "$1" python benchmarks/throughput.py --json "$out/$1.json" "${@:2}"
}

# These files alone, as others may need what the machine lacks; and its software may warn.
mapfile -t files < <(grep -rl --include='*.py' 'mark\.gpu' tests | sort)
part tests python -m pytest -m gpu -q -W default --durations=5 "${files[@]}"
part blocks python benchmarks/blocks.py "$out/blocks.json"
measure train_s --sizes s --batch 512
measure train_b --sizes b --batch 256
measure infer_b --sizes b --batch 512 --mode infer --peers timm timm-rope
measure profile_s --sizes s --batch 512 --profile vitral
for kernels in auto plain; do # the loss curves of both
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
