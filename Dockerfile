# odcft on a GPU host:
#   docker build -t odcft .
#   docker run --gpus all --shm-size 8g --user $(id -u):$(id -g) --read-only --tmpfs /tmp \
#       -v /data:/data -v /runs:/runs odcft finetune /data/ckpt.pth /data/images --out /runs/mine
# --shm-size: loader processes hand images over through shared memory, and Docker's default of 64 MB is too little.
# --read-only --tmpfs /tmp may be left out: nothing is written but to /tmp and the folders on the command line.
#
# No CUDA in the base: torch's wheel brings the one it was built with (the driver must be new enough for that one).
FROM python:3.12-slim-bookworm

ENV PATH=/opt/odcft/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/odcft

# Gigabytes, and seldom new: before the source, so that a change of ours does not fetch them again.
WORKDIR /src
COPY pyproject.toml constraints.txt tools/requirements.py ./
RUN python requirements.py pyproject.toml gpu onnx > requirements.txt \
    && pip install --constraint constraints.txt --requirement requirements.txt

COPY README.md LICENSE setup.py ./
COPY odcft ./odcft
COPY recipes ./recipes
RUN pip install --no-deps --no-build-isolation . \
    && useradd --uid 1000 --create-home odcft

# Any user will do (`docker run --user`).
USER 1000
WORKDIR /home/odcft
ENV HOME=/tmp
ENTRYPOINT ["odcft"]
CMD ["--help"]
