# xattn with the versions of uv.lock. docs/devices.md says how to start it.
#
#     docker build -t xattn .                          # computes on CPUs
#     docker build -t xattn --build-arg EXTRA=cuda .   # and on NVIDIA GPUs
FROM python:3.11-slim

ENV PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore UV_NO_CACHE=1 UV_PYTHON_DOWNLOADS=never PYTHONUNBUFFERED=1
RUN pip install uv
WORKDIR /opt/xattn

# First and alone: a change of the source does not install these again. EXTRA is one more of pyproject.toml's extras.
ARG EXTRA=hf
COPY pyproject.toml uv.lock ./
RUN uv sync --frozen --no-install-project --extra hf --extra tune --extra slurm --extra "$EXTRA"

COPY README.md LICENSE ./
COPY hydra_plugins ./hydra_plugins
COPY conf ./conf
COPY xattn ./xattn
RUN uv sync --frozen --no-editable --extra hf --extra tune --extra slurm --extra "$EXTRA"
ENV PATH=/opt/xattn/.venv/bin:$PATH

# Runs, compiled programs and tokenised texts are written below /work, which is to be a folder of the host.
RUN useradd --create-home --uid 1000 xattn && mkdir /work && chown xattn /work
USER xattn
WORKDIR /work
ENV XDG_CACHE_HOME=/work/.cache
ENTRYPOINT ["xattn", "train"]
