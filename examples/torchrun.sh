#!/bin/sh
# All GPUs of this machine, or of several: run it on each, with torchrun's own --nnodes, --node-rank and --rdzv-endpoint.
# torchrun needs the --: without it, --n is taken for the beginning of an option of its own.
torchrun --nproc-per-node 8 -m -- sgm_engine sample --n 50000 --out run/ --format npz --steal
