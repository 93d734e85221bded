# The project on NVIDIA's PyTorch image. Its torch, Triton, Transformer Engine and apex are used as found: everything else goes into an
# environment of its own that sees them, under the container's pins and, where it has none, ours. The last step fails where torch is another.
# Never built on a GPU host by the authors: see docs/slurm.md.
ARG TAG=26.02-py3
FROM nvcr.io/nvidia/pytorch:${TAG}

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /opt/minimax-train
COPY pyproject.toml constraints-gpu.txt README.md LICENSE ./
COPY .ci .ci

RUN python -m venv --without-pip --system-site-packages .venv \
    && mkdir packages \
    && .venv/bin/python .ci/image_packages.py --container /etc/pip/constraint.txt --to packages \
    && touch /etc/pip/constraint.txt \
    && .venv/bin/python -m pip install --no-cache-dir --requirement packages/requirements.txt \
       --constraint /etc/pip/constraint.txt --constraint packages/constraints.txt

COPY minimax_train minimax_train
COPY parallel parallel
COPY data data
COPY recipes recipes
COPY slurm slurm

RUN .venv/bin/python -m pip install --no-cache-dir --no-deps --editable . \
    && test "$(python -c 'import torch; print(torch.__file__, torch.__version__)')" = \
            "$(.venv/bin/python -c 'import torch; print(torch.__file__, torch.__version__)')" \
    && .venv/bin/minimax-train --version

ENV PATH=/opt/minimax-train/.venv/bin:$PATH
