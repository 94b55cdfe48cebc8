# odcft on a GPU host:
#   docker build -t odcft .
#   docker run --gpus all --shm-size 8g --user $(id -u):$(id -g) --read-only --tmpfs /tmp \
#       -v /data:/data -v /runs:/runs odcft finetune /data/ckpt.pth /data/images --out /runs/mine
# --shm-size: data loader workers pass images through shared memory, and Docker's default of 64 MB is too little.
# --read-only --tmpfs /tmp is optional: odcft writes only to /tmp and the folders on the command line.
#
# No CUDA in the base image: torch's wheel brings the version it was built with (your driver must be new enough for it).
FROM python:3.12-slim-bookworm

ENV PATH=/opt/odcft/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/odcft

# Dependencies are gigabytes and seldom change: install them before the source, so that a new source keeps this layer.
WORKDIR /src
COPY pyproject.toml constraints.txt tools/requirements.py ./
RUN python requirements.py pyproject.toml gpu onnx tiff heic dicom remote > requirements.txt \
    && pip install --constraint constraints.txt --requirement requirements.txt

COPY README.md LICENSE setup.py ./
COPY odcft ./odcft
COPY recipes ./recipes
RUN pip install --no-deps --no-build-isolation . \
    && useradd --uid 1000 --create-home odcft

# Any other user works as well (`docker run --user`).
USER 1000
WORKDIR /home/odcft
ENV HOME=/tmp
ENTRYPOINT ["odcft"]
CMD ["--help"]
