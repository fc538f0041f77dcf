#!/usr/bin/env bash
# Runs all accuracy experiments that need a GPU, the most informative ones first.
#   benchmarks/accuracy.sh OUT            trains; repeat the command to resume
#   benchmarks/accuracy.sh OUT ledger     writes the rows of finished runs to docs/results
# On SIGTERM the current run writes a checkpoint, so the experiments can be run in pieces by repeating
# `timeout -s TERM 570 benchmarks/accuracy.sh OUT`. Finished parts are skipped. A failed part does not
# stop the others, and is retried the next time.
#
# CIFAR10, CIFAR100 and IMAGENETTE are paths of a folder or pack with each dataset; without them,
# torchvision downloads it. With a folder, CIFAR10_NAME and so on are the names of the data in tables
# and rows, and must mention a re-encoding as JPEG. Give the same values each time. SEEDS defaults to
# "0 1 2". EXTRA contains additional settings for every run. PARTS="cifar10 heads" runs only these
# parts.
#
# part         runs (seeds 0 1 2)                            rows
# cifar10      the recipe and timm's ViT, with the recipe's  cifar10 (headline), control
#              optimizer settings and with timm's own
# heads        key/value heads at equal FLOPs, 100 of 400    kv-heads
#              epochs, a tenth of the training images held
#              out
# imagenette   imagenette128 with axial, mixed and learned   imagenette128 (headline), resolution;
#              positions, evaluated from 96 to 256 px        the other sizes: OUT/imagenette
# cifar100     as cifar10                                    cifar100 (headline), control
# ablation     the other studies, as heads                   one study each
#
# Then run `ledger` in a checkout of the training code, or set COMMIT to its commit, and run `python
# benchmarks/ledger.py draw`, which reports the lines that a new study needs in docs/results.md.
set -uo pipefail
out=$(realpath -m "${1:?usage: benchmarks/accuracy.sh OUT [ledger]}")
mode=${2:-train}
read -ra seeds <<<"${SEEDS:-0 1 2}"
read -ra extra <<<"${EXTRA:-}"
short=(--train.epochs 100)
for set in CIFAR10 CIFAR100 IMAGENETTE; do
    name=${set}_NAME
    if [[ -n ${!set:-} ]]; then
        if [[ -z ${!name:-} ]]; then
            echo "accuracy: $name: expected the name of the data in ${!set}, got none; set it" >&2
            exit 2
        fi
        declare "$set=$(realpath "${!set}")"
    fi
done
mkdir -p "$out"
cd "$(dirname "$0")/.." || exit
child= stopped= failed=

# Each part has its own process group (-m), so it gets a signal only once, from this script. A second
# signal would end it without a checkpoint.
set -m
stop() {
    trap '' TERM INT HUP
    stopped=1
    [[ -z $child ]] || kill -TERM "$child"
}
trap stop TERM INT HUP

part() { # NAME PROGRAM...: runs a part, unless the same command has finished before
    local name=$1 code
    shift
    [[ -z ${PARTS:-} || " $PARTS " == *" $name "* ]] || return 0
    [[ $(cat "$out/$name.done" 2>/dev/null) != "$*" ]] || return 0
    echo "== $name: $*"
    "$@" &
    child=$!
    [[ -z $stopped ]] || kill -TERM "$child"
    while wait "$child"; code=$?; kill -0 "$child" 2>/dev/null; do :; done
    child=
    if [[ -n $stopped ]]; then
        echo "stopped after $SECONDS s; repeat the command to resume"
        exit "$code"
    elif ((code)); then
        failed+=" $name"
    else
        echo "$*" >"$out/$name.done"
    fi
}

program() { # NAME SCRIPT DATASET [ARGUMENT...] [-- SETTING...]: trains, or writes rows
    local name=$1 script=$2 set=$3 words=() data=()
    local called=${set}_NAME
    shift 3
    while (($#)) && [[ $1 != -- ]]; do
        words+=("$1")
        shift
    done
    [[ -z ${!set:-} ]] || data=(--data "${!set}")
    [[ -z ${!called:-} || $script == resolution ]] || data+=(--data-name "${!called}")
    if [[ $mode == train ]]; then
        part "$name" python "benchmarks/$script.py" "${words[@]}" "${data[@]}" \
            --seeds "${seeds[@]}" -- "${@:2}" "${extra[@]}"
    elif [[ $script != resolution ]]; then
        python "benchmarks/$script.py" "${words[@]}" "${data[@]}" --ledger ${COMMIT:+--commit "$COMMIT"}
    fi
}

row() { # NAME PREFIX DATASET [OPTION...]: writes the row of the runs with that prefix
    local name=$1 runs=("$out/$2"-seed*) called=${3}_NAME
    [[ $mode == ledger && -d ${runs[0]} ]] || return 0
    python benchmarks/ledger.py add "$name" "${runs[@]}" "${@:4}" \
        ${!called:+--data "${!called}"} ${COMMIT:+--commit "$COMMIT"}
}

wants() { # NAME: whether to process a part; in ledger mode, whether it has runs
    [[ $mode == train || -d $out/$1/runs ]]
}

if wants cifar10; then
    program cifar10 peer_accuracy CIFAR10 cifar10 "$out/cifar10"
    row cifar10 cifar10/runs/vitral CIFAR10
fi
if wants ablation; then
    program heads ablate CIFAR10 "$out/ablation" --only kv-heads -- "${short[@]}"
fi
if wants imagenette; then
    program imagenette resolution IMAGENETTE "$out/imagenette"
    row imagenette128 imagenette/runs/axial IMAGENETTE
    for positions in axial mixed learned; do
        row "resolution-$positions" "imagenette/runs/$positions" IMAGENETTE \
            --study resolution --title "$positions positions"
    done
fi
if wants cifar100; then
    program cifar100 peer_accuracy CIFAR100 cifar100 "$out/cifar100"
    row cifar100 cifar100/runs/vitral CIFAR100
fi
if wants ablation; then
    program ablation ablate CIFAR10 "$out/ablation" \
        --only positions parts norm optimizer augmentation rate growing -- "${short[@]}"
fi
if [[ -n $failed ]]; then
    echo "failed:$failed; repeat the command to retry" >&2
    exit 1
fi
