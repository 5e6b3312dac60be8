# A server on the CPU: docker build --tag hellm . and then as docs/guides/serving.md says.
ARG PYTHON=3.12

FROM python:${PYTHON}-slim-bookworm AS build
# The distribution keeps one version of a package only, so a pinned one would soon be gone.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && python -m venv /opt/hellm
ENV PATH=/opt/hellm/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY constraints.txt ./
# Without what GPUs need, and first: the pinned version then satisfies every other requirement.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# hadolint ignore=DL3013
RUN pip install --constraint constraints.txt --index-url "$TORCH_INDEX" torch
COPY pyproject.toml CMakeLists.txt README.md LICENSE ./
COPY licenses licenses
COPY csrc csrc
COPY kernels kernels
COPY hellm hellm
ARG EXTRAS=serve
RUN pip install --constraint constraints.txt ".[$EXTRAS]"

FROM python:${PYTHON}-slim-bookworm
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home hellm \
    && install --directory --owner=hellm --group=hellm /srv/store
COPY --from=build /opt/hellm /opt/hellm
ENV PATH=/opt/hellm/bin:$PATH PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /srv
VOLUME /srv/store
EXPOSE 8000
# Ready only after the self-test and a first list.
HEALTHCHECK --interval=10s --timeout=5s --start-period=2m CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health/ready', timeout=4)"]
ENTRYPOINT ["hellm"]
CMD ["serve", "/srv/run", "--host", "0.0.0.0", "--port", "8000", "--store", "/srv/store/events.sqlite"]
