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

# One long sequence a step: attention with dropout over 768 bytes, on top of the matrix products.
job="python train.py --batch-size 1 --context 768"

show flatout doctor --quiet $job
show flatout tune --budget 4m --plan flatout.toml $job
if [ -f flatout.toml ]; then
    show sed -n '/^\[plan\]/,/^$/p' flatout.toml
    show flatout run --plan flatout.toml $job --steps 100
else
    show flatout run $job --steps 100
fi
