"""Counts and times of a server, in Prometheus' format."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from cm3leon.serve.desk import Desk

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
"""Bounds of the histogram of requests' times, in seconds."""


class Metrics:
    """Counts of requests, and figures of the engine, which are read when they are asked for."""

    def __init__(self, desk: Desk) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(desk))
        self._requests = Counter(
            "cm3leon_requests",
            "Requests by endpoint and status.",
            ["endpoint", "status"],
            registry=self._registry,
        )
        self._seconds = Histogram(
            "cm3leon_request_seconds",
            "Time from a request to the end of its answer.",
            ["endpoint"],
            buckets=SECONDS,
            registry=self._registry,
        )

    def count(self, endpoint: str, status: int, seconds: float) -> None:
        """Count a request that has been answered."""
        self._requests.labels(endpoint, str(status)).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def text(self) -> bytes:
        """All metrics as Prometheus reads them."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """Figures of the engine at the time of the question."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        shared = self._desk.service.engine
        engine, stats = shared.engine, shared.stats

        # Values that go up and down, then counts that only grow.
        gauges: dict[str, tuple[str, float]] = {
            "open_requests": ("Requests in work.", self._desk.open),
            "waiting_samples": ("Samples that wait for rows.", shared.waiting),
            "running_samples": ("Samples in the making.", shared.running),
            "waiting_samples_limit": ("Samples that may wait.", shared.waiting_limit),
            "running_samples_limit": ("Samples in the making at most.", engine.shape.groups),
            "cache_bytes": ("Bytes of keys and values, fixed at the start.", engine.cache_bytes),
        }
        counters: dict[str, tuple[str, float]] = {
            "samples_finished": ("Samples that were finished.", stats.finished),
            "samples_cancelled": ("Samples whose client had gone.", stats.cancelled),
            "samples_failed": ("Samples that ended in an error.", stats.failed),
            "tokens": ("Tokens of finished samples.", stats.tokens),
            "steps": ("Passes over next tokens.", engine.steps),
            "step_seconds": ("Time that steps have taken.", stats.busy_seconds),
            "waited_seconds": ("Time that samples have waited for rows.", stats.waited_seconds),
        }
        for name, (what, value) in gauges.items():
            yield GaugeMetricFamily(f"cm3leon_{name}", what, value=value)
        for name, (what, value) in counters.items():
            yield CounterMetricFamily(f"cm3leon_{name}", what, value=value)
