#!/usr/bin/env bash
# Samples with 8 jobs of one GPU each, then gathers and evaluates in one more:
#
#   bash examples/slurm/sample.sh [more flags of the driver]
#
# Copy it and edit it; --print_sbatch shows what is submitted, and submits nothing.
set -euo pipefail

"${PYTHON:-python}" "$(dirname "${BASH_SOURCE[0]}")/../../scripts/generate_processes_diffusion_and_reverse.py" \
    --dataset imagenet64 --t_prime 400 --steps 8 --sampler dpmpp_2m_sde \
    --submit slurm --num_machines 8 \
    --slurm_args="--gres=gpu:1 --cpus-per-task=8 --time=4:00:00" "$@"
