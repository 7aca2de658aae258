# docker build -t fastssl .
# docker run --gpus all --shm-size=2g -v "$PWD:/workspace" fastssl train recipes/cifar10/zprob_barlow.yaml
#
# The install commands are those of a machine without Docker: `make wheel` and `make setup`.

ARG BASE=nvidia/cuda:13.0.1-base-ubuntu24.04

# Stage 1: the FFCV wheel. OpenCV's headers and its other build packages stay in this stage.
FROM ${BASE} AS wheel
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates make python3
WORKDIR /opt/fastssl
COPY Makefile constraints.txt ./
COPY scripts scripts
RUN make wheel

# Stage 2: the environment. g++ and Python's headers are for torch.compile, which builds kernels
# while training runs.
FROM ${BASE}
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates make python3 g++ python3-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/fastssl
COPY --from=wheel /opt/fastssl/.cache .cache
# The files that `make setup` reads are copied first, so that a change to the sources does not install everything again.
COPY Makefile pyproject.toml constraints.txt LICENSE README.md ./
COPY scripts scripts
RUN PIP_NO_CACHE_DIR=1 make setup && rm -rf /var/lib/apt/lists/*
COPY . .

ENV PATH=/opt/fastssl/.venv/bin:$PATH
WORKDIR /workspace
ENTRYPOINT ["fastssl"]
CMD ["--help"]
