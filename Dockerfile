# The server as an image: `docker build .` for CPUs, `docker build --target gpu .` for NVIDIA GPUs. See deploy/README.md.
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
# What pip is told to get torch: a requirement, and options such as an index. It changes least, so it comes first.
ARG TORCH="torch==2.13.0"
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
# The optional secret `pip` is pip's own config file: an index or mirror, with its password, that stays out of the image.
RUN --mount=type=secret,id=pip,target=/etc/pip.conf --mount=type=cache,target=/root/.cache/pip \
    pip install $TORCH
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY adapters adapters
COPY tta_server tta_server
RUN --mount=type=secret,id=pip,target=/etc/pip.conf --mount=type=cache,target=/root/.cache/pip \
    pip wheel --no-deps --wheel-dir /wheels .
# Of the package, separated by commas; the demo's client needs `demo`.
ARG EXTRAS=""
RUN --mount=type=secret,id=pip,target=/etc/pip.conf --mount=type=cache,target=/root/.cache/pip \
    pip install "$(ls /wheels/*.whl)${EXTRAS:+[$EXTRAS]}"

FROM build AS build-gpu
# For CUDA 13, as torch 2.13 is.
ARG ONNXRUNTIME="onnxruntime-gpu>=1.31,<2"
RUN --mount=type=secret,id=pip,target=/etc/pip.conf --mount=type=cache,target=/root/.cache/pip \
    pip install $ONNXRUNTIME

FROM python:${PYTHON}-slim AS runtime
RUN groupadd --gid 10001 tta \
    && useradd --uid 10001 --gid tta --no-create-home --home-dir /var/lib/tta-server --shell /usr/sbin/nologin tta \
    && install --directory --owner tta --group tta /models /var/lib/tta-server \
    && install --directory --owner tta --group tta --mode 700 /var/lib/tta-server/state
# TTA_HEALTH: where the health check asks; another one for another port or TLS.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    TTA_HEALTH=http://127.0.0.1:8000/v2/health/ready
WORKDIR /var/lib/tta-server
USER 10001:10001
EXPOSE 8000
# Past any proxy of the environment. An answer other than 200 raises, and so exits 1.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 CMD ["python", "-c", \
    "import os, urllib.request as r; r.build_opener(r.ProxyHandler({})).open(os.environ['TTA_HEALTH'], timeout=4)"]
ENTRYPOINT ["tta-server"]
CMD ["serve", "/models/config.yaml", "--host", "0.0.0.0"]

FROM runtime AS gpu
# For the NVIDIA container runtime, which the host must have.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-gpu /opt/venv /opt/venv

FROM runtime AS cpu
COPY --from=build /opt/venv /opt/venv
