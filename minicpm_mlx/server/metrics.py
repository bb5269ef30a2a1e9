"""Measurements of the server in the format of Prometheus."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

import mlx.core as mx
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .reply_stream import Chunk
from .service import Service

SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 300)
TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2)
CONTENT_TYPE = CONTENT_TYPE_LATEST
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS")


class Metrics:
    """Counts requests and replies."""

    def __init__(self, service: Service):
        self.registry = CollectorRegistry()
        self.registry.register(_StateCollector(service))
        self._requests = Counter(
            "minicpm_requests",
            "Requests by route and status",
            ("method", "route", "status"),
            registry=self.registry,
        )
        self._latency = self._histogram("minicpm_request_seconds", "Seconds a request took")
        self._first = self._histogram(
            "minicpm_time_to_first_token_seconds", "Seconds from a request to its first token"
        )
        self._between = self._histogram(
            "minicpm_inter_token_seconds", "Seconds between two tokens of a reply", TOKEN_SECONDS
        )
        self._tokens = {
            kind: Counter(f"minicpm_{kind}_tokens", text, registry=self.registry)
            for kind, text in (
                ("prompt", "Tokens of prompts"),
                ("cached", "Tokens of prompts that the prefix cache had"),
                ("completion", "Tokens of replies"),
            )
        }
        self._replies = Counter(
            "minicpm_replies", "Finished replies by reason", ("reason",), registry=self.registry
        )
        service.observers.append(self.on_chunk)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
        return Histogram(name, text, buckets=buckets, registry=self.registry)

    def on_response(self, scope: MutableMapping[str, Any], status: int, seconds: float) -> None:
        """Counts a response by the pattern of its route: clients could send any number of paths."""
        route = getattr(scope.get("route"), "path", "-")
        method = scope["method"] if scope["method"] in METHODS else "-"
        self._requests.labels(method, route, str(status)).inc()
        self._latency.observe(seconds)

    def on_chunk(self, chunk: Chunk) -> None:
        if chunk.pause is not None:
            self._between.observe(chunk.pause)
        if chunk.stats is None:
            return
        stats = chunk.stats
        self._replies.labels(chunk.finish_reason or "-").inc()
        for kind, counter in self._tokens.items():
            counter.inc(getattr(stats, f"{kind}_tokens"))
        self._first.observe(stats.ttft)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _StateCollector(Collector):
    """Reads the server's state whenever the metrics are requested."""

    def __init__(self, service: Service):
        self._service = service

    def collect(self) -> Iterator[Metric]:
        for name, value in self._service.state().items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                yield GaugeMetricFamily(f"minicpm_{name}", f"{name} of the server", value=value)
        for name, read_bytes in (
            ("active", mx.get_active_memory),
            ("cache", mx.get_cache_memory),
            ("peak", mx.get_peak_memory),
        ):
            yield GaugeMetricFamily(
                f"minicpm_mlx_{name}_memory_bytes", f"MLX's {name} memory", value=read_bytes()
            )
