# The image that `docker run finrepro invoke reproduce --table 3` runs: a non-root user, no compiler, no network.
# Builds with docker (BuildKit) and buildah alike; how CI builds and tests it is in .ci/image and tests/container.
# Optional, and never part of a layer: the secrets `pipconf` (a pip.conf) and `ca` (certificates, which that
# pip.conf names as /run/secrets/ca.crt), and the build context `wheels`, a folder for that pip.conf's find-links.
ARG BASE_IMAGE=docker.io/library/python:3.11.14-slim-bookworm@sha256:65a93d69fa75478d554f4ad27c85c1e69fa184956261b4301ebaf6dbb0a3543d
ARG LOCK=requirements/cpu.lock

FROM scratch AS wheels

# The packages, installed by ./run as on any machine. Their bytecode is made anew, without timestamps, so that two
# builds are equal byte by byte; templates that are no Python are why the status of that step is ignored.
FROM ${BASE_IMAGE} AS packages
ARG LOCK
WORKDIR /app
COPY run ./
COPY ${LOCK} requirements/
RUN --mount=type=secret,id=pipconf,target=/etc/pip.conf,mode=0444 \
    --mount=type=secret,id=ca,target=/run/secrets/ca.crt,mode=0444 \
    --mount=type=bind,from=wheels,target=/wheels \
    export PIP_NO_CACHE_DIR=1 PYTHONDONTWRITEBYTECODE=1 PYTHONHASHSEED=0 FINREPRO_LOCK="${LOCK}" \
    && sh ./run --version \
    && find .venv -name __pycache__ -type d -prune -exec rm -rf {} + \
    && { .venv/bin/python -m compileall -q -j 2 -x '/tests?/' --invalidation-mode unchecked-hash .venv/lib >/dev/null || true; }

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

FROM ${BASE_IMAGE} AS cpu
# /srv is open to every uid, as /tmp is: `--user` works without a mount.
RUN groupadd --gid 10001 finrepro \
    && useradd --uid 10001 --gid 10001 --no-log-init --no-create-home --home-dir /tmp finrepro \
    && mkdir -p /srv/finrepro /srv/hf \
    && chown finrepro:finrepro /srv/finrepro /srv/hf && chmod 1777 /srv/finrepro /srv/hf \
    && rm -f /var/log/lastlog /var/log/faillog /etc/passwd- /etc/shadow- /etc/group- /etc/gshadow- /etc/subuid- /etc/subgid-
COPY --from=packages /app/.venv /app/.venv
COPY --from=project /app /app
ARG LOCK
ENV PATH=/app/.venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONPATH=/app PYTHONNOUSERSITE=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    FINREPRO_STORE=/srv/finrepro FINREPRO_LOCK=${LOCK} HF_HOME=/srv/hf \
    HOME=/tmp USER=finrepro MPLCONFIGDIR=/tmp/matplotlib GIT_PYTHON_REFRESH=quiet \
    DO_NOT_TRACK=true MLFLOW_DISABLE_TELEMETRY=true HF_HUB_DISABLE_TELEMETRY=1
ARG VCS_REF=unknown
ARG VERSION=unknown
LABEL org.opencontainers.image.title="finrepro" \
      org.opencontainers.image.description="Reproducibility package for FinGPT-HPC: trains, evaluates and tabulates" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${VCS_REF}"
WORKDIR /app
USER 10001:10001
VOLUME ["/srv/finrepro", "/srv/hf"]
CMD ["invoke", "--list"]
