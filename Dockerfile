# LLaMA-Factory's own image with the plug-in in it:
#   docker build -t llamafactory-sekd .
#   docker run --rm -it --gpus all --ipc host -v "$PWD:/workspace" llamafactory-sekd
ARG HOST_TAG=0.9.4
FROM hiyouga/llamafactory:${HOST_TAG}

WORKDIR /opt/llamafactory_sekd
COPY pyproject.toml README.md LICENSE ./
COPY llamafactory_sekd ./llamafactory_sekd
COPY examples ./examples
COPY docs/schema ./docs/schema
COPY data/dataset_info.json ./data/dataset_info.json

# torch, transformers and the host stay as the image has them: pip only adds what is missing.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[metrics]" \
    && llamafactory-cli env

WORKDIR /workspace
CMD ["bash"]
