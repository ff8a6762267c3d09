# For hosts with NVIDIA GPUs and their container toolkit:
#   docker build --tag translution .
#   docker run --gpus all --ipc host --ulimit memlock=-1 --volume "$PWD:/project" translution plan vit-base/16 --cluster 8xH100
# DeepSpeed compiles its ops with the image's nvcc when they are first used, into /project/.cache.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        g++ libaio-dev openssh-client pdsh python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

RUN python3 -m venv /opt/translution
ENV PATH=/opt/translution/bin:$PATH \
    TORCH_EXTENSIONS_DIR=/project/.cache/torch_extensions

COPY . /src
RUN pip install --no-cache-dir '/src[train,report,serve]'

WORKDIR /project
ENTRYPOINT ["translution"]
