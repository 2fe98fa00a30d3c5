"""What a server counts, for Prometheus: requests, time, tokens, sessions."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from memtx.inference.sessions.pool import SessionPool

LATENCY_BUCKETS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 15, 60, 300)


class Metrics:
    """One server's counters; a registry of its own, so that several may live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        one = self.registry
        self.requests = Counter(
            "memtx_http_requests", "Requests answered.", ["method", "route", "status"], registry=one
        )
        self.request_duration = Histogram(
            "memtx_http_request_duration_seconds",
            "Time to the end of an answer.",
            ["route"],
            buckets=LATENCY_BUCKETS,
            registry=one,
        )
        self.active_requests = Gauge("memtx_http_requests_in_progress", "Requests that are worked on.", registry=one)

    def add_gauge(self, name: str, documentation: str, function: Callable[[], float]) -> None:
        """Show a figure that is looked up when it is asked for."""
        Gauge(name, documentation, registry=self.registry).set_function(function)

    def observe_request(self, method: str, route: str, status_code: int, seconds: float) -> None:
        """Count one answer."""
        self.requests.labels(method, route, str(status_code)).inc()
        self.request_duration.labels(route).observe(seconds)

    def render(self) -> bytes:
        """Return everything in Prometheus's text format."""
        return generate_latest(self.registry)


class PoolMetrics(Metrics):
    """The counters of a server of texts.

    Args:
        pool: whose sessions and calls are counted.
    """

    def __init__(self, pool: SessionPool) -> None:
        super().__init__()
        self.generated_tokens = Counter(
            "memtx_tokens_generated", "Tokens of texts that were made.", registry=self.registry
        )
        calls, table, engine = pool.engine.counters, pool.registry, pool.engine
        self.add_gauge("memtx_tokens_read", "Tokens read.", lambda: calls["score_tokens"])
        self.add_gauge("memtx_score_calls", "Calls that read segments.", lambda: calls["score_calls"])
        self.add_gauge("memtx_score_segments", "Segments that they read.", lambda: calls["score_segments"])
        self.add_gauge("memtx_decode_calls", "Calls that made a token of every text.", lambda: calls["decode_calls"])
        self.add_gauge("memtx_decode_tokens", "Tokens that they made.", lambda: calls["decode_tokens"])
        self.add_gauge("memtx_requests_waiting", "Segments and texts that wait.", lambda: engine.num_waiting)
        self.add_gauge("memtx_requests_running", "Texts that are being made.", lambda: engine.num_running)
        self.add_gauge("memtx_sessions", "Sessions.", lambda: table.counts["total"])
        self.add_gauge("memtx_sessions_in_memory", "Sessions in memory.", lambda: table.counts["in_memory"])
        self.add_gauge("memtx_session_bytes", "Bytes of a session's state.", lambda: pool.session_bytes)
        self.add_gauge("memtx_sessions_per_gb", "Sessions whose states 10^9 bytes hold.", lambda: pool.sessions_per_gb)
