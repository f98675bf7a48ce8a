"""What a running server says of itself, for Prometheus. Labels are names that the server knows, never what a client sent."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from recycler.serving.worker import Worker

ENDPOINTS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics")
disable_created_metrics()  # a second series beside each, of when it began

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """One server's, in a registry of its own."""

    def __init__(self, worker: Worker) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # memory, file descriptors; on Linux
        self.requests = Counter(
            "recycle_requests", "Requests by endpoint and status; 499 where the client left.", ["endpoint", "status"],
            registry=self.registry,
        )  # fmt: skip
        self.tokens = Counter("recycle_tokens", "Tokens of answered requests.", ["kind"], registry=self.registry)
        self.shares = Counter(
            "recycle_routed_tokens", "Tokens of answered requests, times each adapter's share of them.", ["adapter"],
            registry=self.registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "recycle_request_seconds", "From request to last token.", ["kind"], buckets=SECONDS, registry=self.registry
        )
        self.first = Histogram(
            "recycle_first_token_seconds", "From request to first text.", buckets=SECONDS, registry=self.registry
        )
        queue = Gauge("recycle_queue", "Answers that wait.", registry=self.registry)
        active = Gauge("recycle_active", "Answers in the making.", registry=self.registry)
        queue.set_function(lambda: len(worker.waiting))
        active.set_function(lambda: len(worker.running))
        for kind in ("prompt", "completion"):
            self.tokens.labels(kind)

    def counted(self, path: str, status: int) -> None:
        """A request that was answered, or refused."""
        endpoint = next((known for known in ENDPOINTS if path == known or path.startswith(known + "/")), "other")
        self.requests.labels(endpoint, str(status)).inc()

    def answered(self, prompt: int, completion: int, share: Mapping[str, float]) -> None:
        """An answer with so many tokens."""
        self.tokens.labels("prompt").inc(prompt)
        self.tokens.labels("completion").inc(completion)
        for name, part in share.items():
            self.shares.labels(name).inc(abs(part) * (prompt + completion))

    def text(self) -> bytes:
        return generate_latest(self.registry)
