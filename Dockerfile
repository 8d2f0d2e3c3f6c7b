# CPU:   docker build -t swaplora .
# CUDA:  docker build -t swaplora:cuda --build-arg VARIANT=cuda .
ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS builder
ARG VARIANT=cpu
ARG TORCH=2.13.0
ARG TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/swaplora
ENV PATH=/opt/swaplora/bin:$PATH
WORKDIR /build

# torch first and pinned from here on, so that no later package replaces the CPU build; pip's default index has CUDA's
RUN case "$VARIANT" in \
        cpu) pip install --index-url "$TORCH_CPU_INDEX" "torch==$TORCH" ;; \
        cuda) pip install "torch==$TORCH" ;; \
        *) echo "VARIANT must be cpu or cuda, not $VARIANT" >&2; exit 1 ;; \
    esac

# the dependencies have a layer of their own, which a change of the source leaves in the cache
COPY pyproject.toml ./
RUN python -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
        extras = project["optional-dependencies"]; \
        print(*project["dependencies"], *extras["quantized"], *extras["otel"], sep="\n")' > requirements.txt \
    && pip install "torch==$TORCH" -r requirements.txt

COPY README.md LICENSE ./
COPY server ./server
COPY adapters/swaplora_adapters ./adapters/swaplora_adapters
RUN pip wheel --no-deps --wheel-dir dist . && pip install --no-deps dist/*.whl && pip check
# of each kind of x86-64: which is loaded is decided where it runs
RUN if [ "$VARIANT" = cpu ] && [ "$(uname -m)" = x86_64 ]; then python -m swaplora_server.kernels.cpu.ahead; fi


FROM python:${PYTHON}-slim
# kernels are compiled on first start where none that were compiled ahead fit: on other processors, and a GPU's, by Triton,
# for the shapes of the base; its launcher needs a C compiler, which g++ brings, and Python's headers, which the image has
# below /usr/local/include
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /cache --shell /usr/sbin/nologin swaplora \
    && install --directory --owner=swaplora --group=swaplora --mode=0750 /cache /data
COPY --from=builder /opt/swaplora /opt/swaplora

# Beyond loopback the server wants SWAPLORA_API_KEY, and refuses to start without it.
ENV PATH=/opt/swaplora/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOME=/cache \
    XDG_CACHE_HOME=/cache \
    XDG_DATA_HOME=/data \
    SWAPLORA_HOST=0.0.0.0 \
    SWAPLORA_PORT=8000
USER 10001:10001
VOLUME ["/cache", "/data"]
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=5m --retries=3 CMD ["python", "-c", \
    "import os, urllib.request as http; http.urlopen('http://127.0.0.1:' + os.environ['SWAPLORA_PORT'] + '/health', timeout=4)"]
ENTRYPOINT ["swaplora"]
CMD ["serve"]
