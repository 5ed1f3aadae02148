#!/usr/bin/env bash
# Samples all points of a sweep with 8 jobs of one GPU each, then scores and compares them in one more:
#
#   bash examples/slurm/sweep.sh [more flags of scripts/sweep.py]
#
# Copy it and edit it; --print_sbatch shows what is submitted, and submits nothing.
set -euo pipefail

"${PYTHON:-python}" "$(dirname "${BASH_SOURCE[0]}")/../../scripts/sweep.py" \
    --dataset imagenet64 --t_prime 0,200,400 --steps 5,10 --sampler dpmpp_2m_sde --limit 10000 \
    --output_dir sweep_imagenet64 \
    --submit slurm --num_machines 8 \
    --slurm_args="--gres=gpu:1 --cpus-per-task=8 --time=4:00:00" "$@"
