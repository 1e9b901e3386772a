#!/bin/sh
# What every image needs, shared by Dockerfile and coca-scale.def:
#   install.sh system              Debian or Ubuntu packages
#   install.sh python LOCK VENV    virtual environment VENV with the pins and hashes of LOCK
# From the environment: UV_VERSION; DEEPSPEED_CUDA_OPS and TORCH_CUDA_ARCH_LIST for bases with nvcc.
set -eu

system() {
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  # g++ and python3-dev: Triton and engine.compile need them at run time. openmpi-bin has mpi4py's library,
  # openssh-client its way to other nodes. The last four let NCCL use InfiniBand, RoCE and EFA.
  apt-get install -y -qq --no-install-recommends \
    g++ python3 python3-dev python3-venv \
    openmpi-bin openssh-client \
    rdma-core libibverbs1 ibverbs-providers librdmacm1
  rm -rf /var/lib/apt/lists/*
}

python() {
  lock=$1 venv=$2
  python3 -m venv "$venv"
  "$venv/bin/pip" install --quiet --no-cache-dir --disable-pip-version-check "uv==$UV_VERSION"
  export VIRTUAL_ENV="$venv" UV_NO_CACHE=1 UV_COMPILE_BYTECODE=1 PATH="$venv/bin:$PATH"
  # an entry ends with its last hash, on a line without a backslash
  sed '/^deepspeed==/,/[^\\]$/d' "$lock" >/tmp/others.lock
  sed -n '/^deepspeed==/,/[^\\]$/p' "$lock" >/tmp/deepspeed.lock
  uv pip install --quiet --require-hashes -r /tmp/others.lock

  # A run loads no op of DeepSpeed's, unless its recipe turns on more: QUANTIZER for ZeRO++'s
  # zero_quantized_*.
  export DS_ACCELERATOR=cpu
  for op in ${DEEPSPEED_CUDA_OPS:-}; do export DS_ACCELERATOR=cuda "DS_BUILD_$op=1"; done
  uv pip install --quiet --require-hashes --no-deps --no-build-isolation -r /tmp/deepspeed.lock
  rm /tmp/others.lock /tmp/deepspeed.lock
}

"$@"
