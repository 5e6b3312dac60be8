"""What Prometheus reads."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

__all__ = ["Metrics"]

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters of one server, in a registry of its own."""

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("hellm_requests", "Requests.", ["route", "method", "status"], registry=registry)
        self.seconds = Histogram(
            "hellm_request_seconds", "Seconds to the answer.", ["route"], buckets=_SECONDS, registry=registry
        )
        self._counted: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}
        self.batch_size = Histogram(
            "hellm_batch_size", "Requests in a turn of the model.", buckets=_SIZES, registry=registry
        )
        self.waiting = Gauge("hellm_waiting", "Requests that wait for the model.", registry=registry)
        self.ready = Gauge("hellm_ready", "1 when requests are answered.", registry=registry)
        self.users = Gauge("hellm_users", "Users that are known.", registry=registry)
        self.items = Gauge("hellm_items", "Items that are ranked.", registry=registry)
        self.revision = Gauge("hellm_revision", "Stored events and items that are taken up.", registry=registry)
        self.run = Gauge("hellm_run", "1 for the run that is served.", ["model_version"], registry=registry)
        self.lists = Counter("hellm_lists", "Lists that were answered.", ["basis"], registry=registry)
        self.events = Counter("hellm_events", "Events that were stored.", registry=registry)
        self.new_items = Counter("hellm_new_items", "Items that were stored.", registry=registry)
        self.skipped = Counter("hellm_entries_skipped", "Stored entries that fit no run.", registry=registry)
        self.reloads = Counter("hellm_reloads", "Runs that were asked to take over.", ["outcome"], registry=registry)

    def count(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count a request that has been answered."""
        key = (route, method, status)
        if key not in self._counted:
            # To look them up by their labels takes longer than to count.
            self._counted[key] = self.requests.labels(*key), self.seconds.labels(route)
        requests, histogram = self._counted[key]
        requests.inc()
        histogram.observe(seconds)

    def text(self) -> bytes:
        """In the text format of Prometheus."""
        return generate_latest(self.registry)
