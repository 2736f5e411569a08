#!/usr/bin/env bash
# The comparison of docs/results.md: reference convnet on MNIST, ReLU, batch 256, 5 epochs, three seeds, every method
# over a grid of rates that reaches past its best on both sides. About an hour on one core; resumable: run it again.
#
#   benchmarks/mnist.sh mnist.npz runs/mnist
set -euo pipefail
data=${1:?usage: benchmarks/mnist.sh DATA OUT}
out=${2:?usage: benchmarks/mnist.sh DATA OUT}

run() {
    .venv/bin/replica-newton compare --dataset mnist --data "$data" --out "$out" --epochs 5 --seeds 0,1,2 "$@"
}

run --methods sgd --learning-rates 0.03,0.1,0.3,1
run --methods momentum --learning-rates 0.01,0.03,0.1
run --methods adam --learning-rates 0.001,0.003,0.01,0.03
run --methods paper --replicas 2,4,8 --learning-rates 0.03,0.05,0.1,0.3
run --methods paper-common,paper-random --replicas 8 --learning-rates 0.05,0.1,0.3
run --methods saddle-free --replicas 8 --learning-rates 0.1,0.3,1
