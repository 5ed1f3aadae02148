#!/usr/bin/env bash
# Sweeps T' on emoji32: 500 images of the VAE, 8 network evaluations each.
#
#   bash scripts/sweeps/emoji32.sh [flags of scripts/sweep.py]
#   T_PRIMES=0,400 bash scripts/sweeps/emoji32.sh --print_points
#
# Copy this file and edit the variables, or set them in the environment. Lists have commas. The
# same command goes on where it was stopped; other values add points to those that are there.
set -euo pipefail

# 0: the generator's images themselves; scratch: from pure noise
T_PRIMES=${T_PRIMES:-0,200,300,400,500,600}
# evaluations of the network for each image
STEPS=${STEPS:-8}
# ddpm, ddim, dpmpp_2m, dpmpp_2m_sde
SAMPLER=${SAMPLER:-dpmpp_2m_sde}
SEEDS=${SEEDS:-0}
# the first so many of the generator's images
LIMIT=${LIMIT:-500}
# one process each; numbers are GPUs
DEVICES=${DEVICES:-cpu,cpu}
# an .npz or a folder; empty: those of the data set
GENERATOR_IMAGES=${GENERATOR_IMAGES:-}
# where the repository is, for a copy of this file elsewhere
PROJECT=${PROJECT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)}
OUTPUT=${OUTPUT:-$PROJECT/scripts/exps/emoji32/sweep}
PYTHON=${PYTHON:-$PROJECT/.venv/bin/python}

if [[ $PYTHON == "$PROJECT/.venv/bin/python" && ! -x $PYTHON ]]; then
    env -u PYTHON bash "$PROJECT/setup_env.sh"
fi
flags=(
    --dataset emoji32 --output_dir "$OUTPUT" --devices "$DEVICES"
    --t_prime "$T_PRIMES" --steps "$STEPS" --sampler "$SAMPLER" --seed "$SEEDS" --limit "$LIMIT"
)
if [[ -n $GENERATOR_IMAGES ]]; then
    flags+=(--dataset_path "$GENERATOR_IMAGES")
fi
exec "$PYTHON" "$PROJECT/scripts/sweep.py" "${flags[@]}" "$@"
