#!/bin/sh
# sbatch examples/slurm.sh: 32 workers, in whatever order they get their GPU. The folder is one that all nodes share.
#SBATCH --job-name=samples
#SBATCH --array=0-31
#SBATCH --gpus-per-task=1
#SBATCH --requeue
sgm sample --n 50000 --out /shared/run/ --format npz --steal
