"""The metrics of `/metrics`, in Prometheus' text format."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .worker import Work, Worker

METHODS = {"GET", "POST", "HEAD", "OPTIONS"}


class Metrics:
    """Counters of one server; each has its own registry, so that several servers can run in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        kwargs: dict[str, Any] = {"registry": self.registry}
        slow = (0.01, 0.1, 0.5, 1, 2, 5, 10, 20, 40, 80, 160)
        self._requests = Counter("unclip_requests", "Requests answered.", ["method", "path", "status"], **kwargs)
        self._seconds = Histogram("unclip_request_seconds", "How long requests took.", ["path"], buckets=slow, **kwargs)
        self._images = Counter("unclip_pictures", "Images drawn.", ["operation"], **kwargs)
        self._batches = Histogram("unclip_batch_pictures", "Images in a batch.", buckets=(1, 2, 4, 8, 16), **kwargs)
        self._model = Counter("unclip_model_seconds", "Time that the model drew.", ["operation"], **kwargs)
        self._waiting = Gauge("unclip_waiting_pictures", "Images in the queue.", **kwargs)
        self._running = Gauge("unclip_running_pictures", "Images that are being drawn.", **kwargs)

    def watch(self, worker: Worker) -> None:
        self._waiting.set_function(lambda: worker.waiting)
        self._running.set_function(lambda: worker.running)

    def record_batch(self, work: Work, jobs: int, seconds: float) -> None:
        self._images.labels(work.name).inc(jobs)
        self._batches.observe(jobs)
        self._model.labels(work.name).inc(seconds)

    def record_request(self, method: str, path: str, status: int, seconds: float) -> None:
        method = method if method in METHODS else "other"
        self._requests.labels(method, path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)
