# The versions that the suite was last run with, and xattn. docs/devices.md says how to start it.
#
#     docker build -t xattn .                          # computes on CPUs
#     docker build -t xattn --build-arg EXTRA=cuda .   # and on NVIDIA GPUs
FROM python:3.11-slim

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PYTHONUNBUFFERED=1

# First and alone: a change of the source does not install these again.
COPY locks/python3.11.txt /opt/xattn/lock.txt
RUN pip install -r /opt/xattn/lock.txt

# An extra of pyproject.toml, for what the lock lacks: cuda, ray. The lock holds down the versions that it has.
ARG EXTRA=
COPY pyproject.toml README.md LICENSE /opt/xattn/source/
COPY hydra_plugins /opt/xattn/source/hydra_plugins
COPY conf /opt/xattn/source/conf
COPY xattn /opt/xattn/source/xattn
RUN pip install --no-deps /opt/xattn/source \
    && if [ -n "$EXTRA" ]; then pip install -c /opt/xattn/lock.txt "/opt/xattn/source[$EXTRA]"; fi

# Runs, compiled programs and tokenised texts are written below /work, which is to be a folder of the host.
RUN useradd --create-home --uid 1000 xattn && mkdir /work && chown xattn /work
USER xattn
WORKDIR /work
ENV XDG_CACHE_HOME=/work/.cache
ENTRYPOINT ["xattn", "train"]
