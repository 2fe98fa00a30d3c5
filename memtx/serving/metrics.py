"""What a server counts, for Prometheus: requests, time, tokens, sessions."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from memtx.inference.pool import SessionPool

SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 15, 60, 300)


class Metrics:
    """One server's counters; a registry of its own, so that several may live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        one = self.registry
        self.requests = Counter("memtx_requests", "Requests answered.", ["method", "route", "status"], registry=one)
        self.seconds = Histogram(
            "memtx_request_seconds", "Time to the end of an answer.", ["route"], buckets=SECONDS, registry=one
        )
        self.working = Gauge("memtx_requests_working", "Requests that are worked on.", registry=one)

    def read(self, name: str, help_: str, value: Callable[[], float]) -> None:
        """Show a figure that is looked up when it is asked for."""
        Gauge(name, help_, registry=self.registry).set_function(value)

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one answer."""
        self.requests.labels(method, route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """Return everything in Prometheus's text format."""
        return generate_latest(self.registry)


class PoolMetrics(Metrics):
    """The counters of a server of texts.

    Args:
        pool: whose sessions and calls are counted.
    """

    def __init__(self, pool: SessionPool) -> None:
        super().__init__()
        self.made = Counter("memtx_tokens_made", "Tokens of texts that were made.", registry=self.registry)
        calls, table, engine = pool.engine.calls, pool.table, pool.engine
        self.read("memtx_tokens_read", "Tokens read.", lambda: calls["read_tokens"])
        self.read("memtx_read_calls", "Calls that read segments.", lambda: calls["read"])
        self.read("memtx_read_rows", "Segments that they read.", lambda: calls["read_rows"])
        self.read("memtx_step_calls", "Calls that made a token of every text.", lambda: calls["step"])
        self.read("memtx_step_rows", "Tokens that they made.", lambda: calls["step_rows"])
        self.read("memtx_waiting", "Segments and texts that wait.", lambda: engine.waiting)
        self.read("memtx_decoding", "Texts that are being made.", lambda: engine.decoding)
        self.read("memtx_sessions", "Sessions.", lambda: table.counts["all"])
        self.read("memtx_sessions_resident", "Sessions in memory.", lambda: table.counts["resident"])
        self.read("memtx_session_bytes", "Bytes of a session's state.", lambda: pool.session_bytes)
        self.read("memtx_sessions_per_gb", "Sessions whose states 10^9 bytes hold.", lambda: pool.sessions_per_gb)
