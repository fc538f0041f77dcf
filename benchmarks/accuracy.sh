#!/usr/bin/env bash
# Every accuracy figure that needs a GPU, in the order of what it tells most.
#   benchmarks/accuracy.sh OUT            trains; typed again, it goes on where it was cut off
#   benchmarks/accuracy.sh OUT ledger     writes the rows of what is finished into docs/results
# So `timeout -s TERM 570 benchmarks/accuracy.sh OUT`, typed again and again, gets through it: at the
# signal the run in progress writes a checkpoint. A part that is finished is not looked at again; one
# that failed is tried again the next time, after which the others go on.
#
# CIFAR10, CIFAR100 and IMAGENETTE name a folder or pack of each; without them torchvision downloads
# the set. With a folder, CIFAR10_NAME and so on say what it is, as tables and rows will: a
# re-encoding as JPEG is called so. The same must be given each time. SEEDS are "0 1 2"; EXTRA are
# more settings for every run; PARTS="cifar10 heads" takes some of the parts alone.
#
# part         runs (seeds 0 1 2)                            rows
# cifar10      the recipe beside timm's ViT, with the        cifar10 (headline), control
#              recipe's optimiser settings and its own
# heads        key/value heads at equal FLOPs, 100 of 400    kv-heads
#              epochs, a tenth of the training images out
# imagenette   imagenette128 with axial, mixed and learned   imagenette128 (headline), resolution;
#              positions, tested from 96 to 256 px           the other sizes: OUT/imagenette
# cifar100     as cifar10                                    cifar100 (headline), control
# ablation     the other studies, as heads                   one study each
#
# Afterwards, in a checkout of the code that trained, `ledger`, then `python benchmarks/ledger.py
# draw`, which names the lines that a new study needs in docs/results.md. Or COMMIT names that code.
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
            echo "accuracy: $name: expected what is in ${!set}, as tables will call it, got none" >&2
            exit 2
        fi
        declare "$set=$(realpath "${!set}")"
    fi
done
mkdir -p "$out"
cd "$(dirname "$0")/.." || exit
child= stopped= failed=

# In a group of its own (-m), a part gets a signal once, from here, whoever else it was sent to:
# a second one would end it without a checkpoint.
set -m
stop() {
    trap '' TERM INT HUP
    stopped=1
    [[ -z $child ]] || kill -TERM "$child"
}
trap stop TERM INT HUP

part() { # NAME PROGRAM...: unless it is finished by the same command
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
        echo "stopped after $SECONDS s; the same command goes on"
        exit "$code"
    elif ((code)); then
        failed+=" $name"
    else
        echo "$*" >"$out/$name.done"
    fi
}

program() { # NAME SCRIPT SET [ARGUMENT...] [-- SETTING...]: trains, or writes rows
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

row() { # NAME RUNS SET [OPTION...]: of the runs that start so, a row
    local name=$1 runs=("$out/$2"-seed*) called=${3}_NAME
    [[ $mode == ledger && -d ${runs[0]} ]] || return 0
    python benchmarks/ledger.py add "$name" "${runs[@]}" "${@:4}" \
        ${!called:+--data "${!called}"} ${COMMIT:+--commit "$COMMIT"}
}

wants() { # NAME: in ledger mode, whether there is anything of a part
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
    echo "failed:$failed; the same command tries again" >&2
    exit 1
fi
