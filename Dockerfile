# The command infomcr and its packages in /opt/venv, launch/ and the demo's images in /opt/infomcr_dist, an sshd for
# workers; user trainer, 1000.
#
#   docker build -t infomcr_dist --secret id=pip.conf,src=pip.conf .
#   docker build -t infomcr_dist --build-arg DEVICE=cuda --build-arg BUILD_BASE=nvidia/cuda:13.0.2-devel-ubuntu24.04 \
#       --build-arg BASE=nvidia/cuda:13.0.2-base-ubuntu24.04 .
#   docker build -t infomcr_dist --build-arg ENGINE=torch .
#
# ENGINE=torch leaves Horovod out, and what it is built with: torchrun starts the workers, in minutes less of building.
# DEVICE is the build of torch that pip has to find: the default index has the one for CUDA; pip.conf, which stays out of
# the image, gives the place of a CPU build. The bases are of one release of Debian or Ubuntu, with Python 3.11 or later;
# for CUDA, BUILD_BASE has nvcc and NCCL's headers, of torch's CUDA version.
ARG BASE=debian:bookworm-slim
ARG BUILD_BASE=$BASE

# Torch, and Horovod built against it: minutes, and repeated only when these files change.
FROM $BUILD_BASE AS horovod
ARG DEVICE=cpu ENGINE=horovod
ENV DEBIAN_FRONTEND=noninteractive PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN apt-get update \
    && if [ "$ENGINE" = horovod ]; then set -- g++ make patch python3-dev; else set --; fi \
    && apt-get install -y --no-install-recommends "$@" python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /build
COPY constraints.txt ./
COPY launch/build_horovod.sh launch/
COPY launch/horovod launch/horovod
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --constraint constraints.txt setuptools wheel cmake numpy torch \
    && /opt/venv/bin/python -c 'import sys, torch; found = "cuda" if torch.version.cuda else "cpu"; \
        sys.exit(found != sys.argv[1] and f"DEVICE={sys.argv[1]}, but pip found a {found} build of torch: name another place in pip.conf")' "$DEVICE" \
    && if [ "$ENGINE" = horovod ]; then XDG_CACHE_HOME=/build/cache launch/build_horovod.sh /opt/venv/bin/python; fi

# The other packages, without what only their builds or tests need; then this project and the demo's shards.
FROM horovod AS build
COPY pyproject.toml ./
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    /opt/venv/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' >requirements.txt \
    && /opt/venv/bin/pip install --constraint constraints.txt --requirement requirements.txt \
        $(find cache -name "horovod-*.whl" 2>/dev/null) \
    && cd /opt/venv/lib/python3*/site-packages \
    && find . -type d \( -name include -o -name tests -o -path ./torch/test \) -prune -exec rm -r {} + \
    && find torch/bin -type f ! -name torch_shm_manager -delete \
    && if [ -d horovod ]; then find horovod -name '*.so' -exec strip --strip-unneeded {} +; fi
COPY README.md LICENSE ./
COPY pipelines pipelines
COPY infomcr_dist infomcr_dist
RUN /opt/venv/bin/pip install --no-deps --no-build-isolation . \
    && /opt/venv/bin/pip uninstall --yes cmake wheel pip \
    && /opt/venv/bin/infomcr prepare fashion-mnist data/fashion-mnist

FROM $BASE
# HOME: horovodrun and matplotlib write below it. sshd's sessions do not see ENV: they get PATH from the server, whose keys
# are made where the image runs. Ubuntu has a user 1000 of its own.
ENV PATH=/opt/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends iproute2 openssh-client openssh-server python3 \
    && rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_* \
    && echo "SetEnv PATH=$PATH" >/etc/ssh/sshd_config.d/path.conf \
    && if id --name --user 1000 2>/dev/null; then userdel --remove "$(id --name --user 1000)"; fi \
    && useradd --uid 1000 --password '*' --create-home --shell /bin/bash trainer
COPY --from=build /opt/venv /opt/venv
WORKDIR /opt/infomcr_dist
COPY --from=build /build/data data
COPY launch launch
USER trainer
# For a container that trains: its rank 0 answers. A trainer that hangs ends by itself (hang_timeout_seconds).
HEALTHCHECK --interval=30s --timeout=10s --start-period=5m \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:9500/metrics', timeout=5)"]
CMD ["sh", "-c", "if command -v horovodrun >/dev/null; then exec horovodrun -np 2 \"$@\"; fi; \
    exec torchrun --standalone --nproc-per-node 2 --no-python \"$@\"", "sh", "infomcr", "train", "run_dir=/tmp/run"]
