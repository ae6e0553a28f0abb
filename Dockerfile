# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
#
# docker build -t vllm-sparse .
# docker run --gpus all --ipc host -p 8000:8000 -e HF_TOKEN -v models:/home/vllm/.cache/huggingface \
#   vllm-sparse MODEL --attention-backend ROCKETKV
#
# No GPU has run the plugin yet, and start-up says so: see docs/gpu.md before you rely on it, and
# for running the checks of a checkout in this image, which has no programs but vLLM's.

FROM vllm/vllm-openai:v0.32.0

COPY . /tmp/vllm-sparse
# --no-deps: the image already has every dependency, and vLLM's pins must stay as they are.
RUN pip install --no-cache-dir --no-deps /tmp/vllm-sparse && rm -rf /tmp/vllm-sparse

# The image may have this user already. A volume that is mounted on the folder of models takes its
# owner from it.
ENV HOME=/home/vllm
RUN (id vllm >/dev/null 2>&1 || useradd --create-home vllm) \
    && mkdir -p /home/vllm/.cache/huggingface && chown -R vllm /home/vllm
# By name: whoever has it already has an id that is not known here.
# hadolint ignore=DL3066
USER vllm
WORKDIR /home/vllm

# The base image's ENTRYPOINT, `vllm serve`, is kept.
