# The commands es-ddpm-* in an image, for a CPU:
#
#   docker build -t es-ddpm .
#   docker run --rm --user "$(id -u)" -v "$PWD:/work" es-ddpm \
#       es-ddpm-sample --dataset emoji32 --devices cpu --t_prime 500 --steps 8 \
#       --sampler dpmpp_2m_sde --limit 1000 --output_dir emoji --execute
#
# For NVIDIA GPUs (torch brings CUDA; the machine needs the driver and its container toolkit):
#
#   docker build -t es-ddpm --build-arg TORCH_INDEX=https://pypi.org/simple .
#   docker run --gpus all ...
#
# Without TensorFlow and MPI: the evaluator computes in PyTorch, training starts with torchrun.
FROM python:3.11-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

# --compile needs a compiler.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/es-ddpm
COPY requirements.txt .
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" "$(grep '^torch==' requirements.txt)" \
    && grep -vE '^(torch|tensorflow|mpi)' requirements.txt > /tmp/requirements.txt \
    && pip install --no-cache-dir -r /tmp/requirements.txt

# Installed in place, so that the preset emoji32 finds its files.
COPY . .
RUN pip install --no-cache-dir --no-deps --editable .

# Any user may run it; caches of torch and of the Inception graph go here.
ENV HOME=/tmp
WORKDIR /work
CMD ["es-ddpm-sample", "--help"]
