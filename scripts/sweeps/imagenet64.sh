#!/usr/bin/env bash
# Sweeps T' on ImageNet at 64 x 64: images of BigGAN-deep, classifier guidance.
#
#   bash scripts/sweeps/imagenet64.sh [flags of scripts/sweep.py]
#   T_PRIMES=0,400 bash scripts/sweeps/imagenet64.sh --print_points
#
# Copy this file and edit the variables, or set them in the environment. Lists have commas. The
# same command goes on where it was stopped; other values add points to those that are there.
# The published files have to be there: python scripts/download.py imagenet64
set -euo pipefail

# 0: the generator's images themselves; scratch: from pure noise
T_PRIMES=${T_PRIMES:-0,100,200,300,400,500}
# evaluations of the network for each image
STEPS=${STEPS:-10,25}
# ddpm, ddim, dpmpp_2m, dpmpp_2m_sde
SAMPLER=${SAMPLER:-dpmpp_2m_sde}
# factors of the classifier's gradient; 0: none
GUIDANCE=${GUIDANCE:-1.0}
SEEDS=${SEEDS:-0}
# the first so many of the generator's images
LIMIT=${LIMIT:-5000}
# one process each; numbers are GPUs
DEVICES=${DEVICES:-0,1,2,3,4,5,6,7}
# an .npz or a folder; empty: those of the data set
GENERATOR_IMAGES=${GENERATOR_IMAGES:-}
# where the repository is, for a copy of this file elsewhere
PROJECT=${PROJECT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)}
OUTPUT=${OUTPUT:-$PROJECT/scripts/exps/imagenet64/sweep}
PYTHON=${PYTHON:-$PROJECT/.venv/bin/python}

if [[ $PYTHON == "$PROJECT/.venv/bin/python" && ! -x $PYTHON ]]; then
    env -u PYTHON bash "$PROJECT/setup_env.sh"
fi
flags=(
    --dataset imagenet64 --output_dir "$OUTPUT" --devices "$DEVICES"
    --t_prime "$T_PRIMES" --steps "$STEPS" --sampler "$SAMPLER" --seed "$SEEDS" --limit "$LIMIT"
    --classifier_guidance_scale "$GUIDANCE"
)
if [[ -n $GENERATOR_IMAGES ]]; then
    flags+=(--dataset_path "$GENERATOR_IMAGES")
fi
exec "$PYTHON" "$PROJECT/scripts/sweep.py" "${flags[@]}" "$@"
