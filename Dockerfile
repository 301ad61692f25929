# The pinned stack for clusters and this package; docs/slurm.md says how it is built and run.
FROM python:3.11-slim-bookworm

# torch.compile and Triton need a compiler. Its version changes no result, so it is not pinned.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 cm3leon && install -d -o cm3leon /runs

# Libraries keep their caches beside the runs, whichever user runs the container.
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 HOME=/runs USER=cm3leon
WORKDIR /opt/cm3leon

# 9 GB in a layer that only the lock changes: after a change of the code it is taken from the cache.
COPY requirements/cluster.lock requirements/cluster.lock
RUN python -m venv /opt/venv \
    && python -m pip install --no-cache-dir -r requirements/cluster.lock

COPY setup.py pyproject.toml README.md LICENSE experiments.yaml ./
COPY experiments experiments
COPY evaluation evaluation
COPY plugins plugins
COPY cm3leon cm3leon
RUN python -m pip install --no-cache-dir --no-deps --no-build-isolation -e .

USER 1000
WORKDIR /runs
ENTRYPOINT ["cm3leon"]
CMD ["--help"]
