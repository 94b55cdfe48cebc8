# odcft in a container; docs/containers.md says how to run it.
#   docker build -t odcft .                             for NVIDIA GPUs
#   docker build -t odcft:cpu --build-arg DEVICE=cpu .  without CUDA: about 2 GB
#
# No CUDA in the base image: torch's wheel brings the version it was built with (your driver must be new enough for it).
ARG PYTHON=3.12
FROM python:${PYTHON}-slim-bookworm AS dependencies
ARG DEVICE=gpu
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
# Dependencies are gigabytes and seldom change: they come before the source, so that a new source keeps this layer.
COPY pyproject.toml constraints.txt tools/requirements.py ./
RUN python -m venv --without-pip /opt/odcft
RUN case "$DEVICE" in \
      gpu) kmeans=gpu ;; \
      cpu) kmeans=faiss; export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu ;; \
      *) echo "DEVICE=$DEVICE: choose gpu or cpu" >&2; exit 1 ;; \
    esac \
    && python requirements.py pyproject.toml "$kmeans" onnx tiff heic dicom remote > requirements.txt \
    && python -m pip --python /opt/odcft/bin/python install --constraint constraints.txt --requirement requirements.txt

FROM dependencies AS package
COPY README.md LICENSE setup.py ./
COPY recipes ./recipes
COPY odcft ./odcft
RUN python -m pip --python /opt/odcft/bin/python install --no-deps --no-build-isolation --prefix /package .

# What is shipped: Python, the packages, and odcft. No compiler, no source, no pip in the environment.
FROM python:${PYTHON}-slim-bookworm
ENV PATH=/opt/odcft/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp
RUN useradd --uid 1000 --no-create-home --home-dir /tmp odcft
COPY --from=dependencies /opt/odcft /opt/odcft
COPY --from=package /package /opt/odcft
# Any other user works as well (`docker run --user`): odcft writes only to /tmp and the folders on the command line.
USER 1000
WORKDIR /tmp
ENTRYPOINT ["odcft"]
CMD ["--help"]
