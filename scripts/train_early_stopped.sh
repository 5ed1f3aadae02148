#!/usr/bin/env bash
# Trains a network for early stop: only the timesteps t < T' that sampling from T' asks it for.
#
#   bash scripts/train_early_stopped.sh [flags of scripts/image_train.py]
#   DATA=my_images IMAGE_SIZE=64 T_PRIME=400 ITERATIONS=100000 bash scripts/train_early_stopped.sh
#
# Copy this file and edit the variables, or set them in the environment. The same command goes on
# where it was stopped. docs/training.md tells what is known of what this saves.
set -euo pipefail

# where the repository is, for a copy of this file elsewhere
PROJECT=${PROJECT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
# a folder of any depth, or an .npz
DATA=${DATA:-$PROJECT/evaluations/precomputed/VIRTUAL_emoji32_labeled.npz}
IMAGE_SIZE=${IMAGE_SIZE:-32}
# noise level to start from; scripts/propose_t_prime.py proposes one if there is a network already
T_PRIME=${T_PRIME:-400}
# optimiser steps in all, and images a step of each process
ITERATIONS=${ITERATIONS:-4000}
BATCH_SIZE=${BATCH_SIZE:-32}
LR=${LR:-2e-3}
EMA_RATE=${EMA_RATE:-0.998}
# min-SNR weights of the loss (0: none)
SNR_GAMMA=${SNR_GAMMA:-5}
SAVE_INTERVAL=${SAVE_INTERVAL:-500}
# one a GPU
PROCESSES=${PROCESSES:-1}
# of the network; these are the ones of emoji32
MODEL_FLAGS=${MODEL_FLAGS:---num_channels 32 --num_res_blocks 1 --channel_mult 1,1,2,4
    --num_head_channels 32 --attention_resolutions 8,4 --learn_sigma True --noise_schedule cosine}
# checkpoints, log.txt, progress.csv and progress.png
OUTPUT=${OUTPUT:-$PROJECT/scripts/exps/early_stopped_t$T_PRIME}
PYTHON=${PYTHON:-$PROJECT/.venv/bin/python}

if [[ $PYTHON == "$PROJECT/.venv/bin/python" && ! -x $PYTHON ]]; then
    env -u PYTHON bash "$PROJECT/setup_env.sh"
fi
launch=("$PYTHON")
if ((PROCESSES > 1)); then
    launch+=(-m torch.distributed.run --nproc_per_node "$PROCESSES")
fi
read -r -d '' -a model_flags <<<"$MODEL_FLAGS" || true
flags=(
    --data_dir "$DATA" --image_size "$IMAGE_SIZE" --early_stop_steps "$T_PRIME"
    --iterations "$ITERATIONS" --batch_size "$BATCH_SIZE" --lr "$LR" --ema_rate "$EMA_RATE"
    --snr_gamma "$SNR_GAMMA"
    --save_interval "$SAVE_INTERVAL" --resume_checkpoint auto
)
export OPENAI_LOGDIR=$OUTPUT
exec "${launch[@]}" "$PROJECT/scripts/image_train.py" "${flags[@]}" "${model_flags[@]}" "$@"
