#!/usr/bin/env bash
# Trains with a process a GPU, on one node or several; goes on from its last checkpoint when it is
# preempted, its time is over or a process dies. From the project's folder:
#
#   OPENAI_LOGDIR=runs/first sbatch examples/slurm/train.sh --data_dir images --image_size 64 …
#
# with the flags of scripts/image_train.py (batch_size: of each process). Copy it and edit it.
#SBATCH --job-name=train
#SBATCH --ntasks=8
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=train_%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
set -uo pipefail
: "${OPENAI_LOGDIR:?name the folder for checkpoints and logs}"

# 300 seconds before the time limit: SIGTERM to the processes, which save and end.
stopped=0
trap 'stopped=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

# The others get a minute to end by themselves: killed at once, they would hide the first one's code.
srun --kill-on-bad-exit=0 --wait=60 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
    "${PYTHON:-python}" scripts/image_train.py --resume_checkpoint auto "$@" &
wait $!
code=$?
if ((stopped)); then # the signal has ended that wait, not the training
    wait $!
    code=$?
fi
# 2 is a mistake in the flags, which another try does not mend. A time limit is no failure, yet there
# is an end to a training that never gets anywhere.
most=$((stopped ? 100 : 5))
if ((stopped || code != 0 && code != 2)) && ((${SLURM_RESTART_COUNT:-0} < most)); then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
