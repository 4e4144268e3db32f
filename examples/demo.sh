#!/bin/sh
# Diagnose, tune and run the language example. Argument: the folder of flatout and python.
set -eu
bin=$(cd "$1" && pwd)
PATH="$bin:$PATH"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cp "$(dirname "$0")"/language/*.py "$folder"
cd "$folder"

show() {
    printf '\n$ %s\n' "$*"
    "$@"
}

# One short sequence a step, as where memory is scarce: the optimizer then weighs in the step, so
# there is something to gain on every machine, also without bfloat16 units.
show flatout doctor --quiet -- python train.py --batch-size 1
show flatout tune --plan flatout.toml -- python train.py --batch-size 1
if [ -f flatout.toml ]; then
    show cat flatout.toml
    show flatout run --plan flatout.toml -- python train.py --batch-size 1 --steps 100
else
    show flatout run -- python train.py --batch-size 1 --steps 100
fi
