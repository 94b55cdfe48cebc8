# odcft on a GPU host:
#   docker build -t odcft .
#   docker run --gpus all --shm-size 8g --user $(id -u):$(id -g) -v /data:/data -v /runs:/runs odcft \
#       finetune /data/ckpt.pth /data/images --out /runs/mine
# --shm-size: loader processes hand images over through shared memory, and Docker's default of 64 MB is too little.
FROM nvidia/cuda:12.6.3-runtime-ubuntu24.04

RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/odcft
ENV PATH=/opt/odcft/bin:$PATH PYTHONUNBUFFERED=1

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY odcft ./odcft
COPY recipes ./recipes
RUN pip install --no-cache-dir .

# The user may be any (`docker run --user`): nothing is written outside the folders given on the command line.
RUN useradd --create-home odcft
USER odcft
WORKDIR /home/odcft
ENV HOME=/tmp
ENTRYPOINT ["odcft"]
CMD ["--help"]
