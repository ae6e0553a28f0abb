# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
#
# docker build -t vllm-sparse .
# docker run --gpus all -p 8000:8000 vllm-sparse MODEL
#
# No GPU has run the plugin yet, and start-up says so: see docs/gpu.md before you rely on it.

FROM vllm/vllm-openai:v0.32.0

COPY . /tmp/vllm-sparse
# --no-deps: the image already has every dependency, and vLLM's pins must stay as they are.
RUN pip install --no-cache-dir --no-deps /tmp/vllm-sparse && rm -rf /tmp/vllm-sparse

RUN useradd --create-home --uid 1000 vllm
USER 1000
WORKDIR /home/vllm

# The base image's ENTRYPOINT, `vllm serve`, is kept.
