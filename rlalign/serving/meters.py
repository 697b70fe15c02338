"""What a reward service counts, for Prometheus."""

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
PICTURES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Meters:
    """Of one service; nothing is shared between services of one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own = {"namespace": "rlalign_reward", "registry": self.registry}
        self.requests = Counter("requests", "Requests answered, by HTTP status.", ["status"], **own)
        self.repeats = Counter("repeats", "Requests that were answered without scoring them again.", **own)
        self.seconds = Histogram("request_seconds", "From the first byte to the answer.", buckets=SECONDS, **own)
        self.calls = Counter("calls", "Calls of the reward: scored, raised, timed_out or died.", ["outcome"], **own)
        self.call_seconds = Histogram("call_seconds", "Of a call of the reward.", buckets=SECONDS, **own)
        self.batch = Histogram("batch_pictures", "Pictures of a call, without filling.", buckets=PICTURES, **own)
        self.pictures = Counter("pictures", "Pictures that got a number.", **own)
        self.waiting = Gauge("waiting", "Requests that are read, wait or are scored.", **own)
        self.workers = Gauge("workers", "Worker processes that are up.", **own)
        self.restarts = Counter("restarts", "Worker processes that were replaced.", **own)

    def text(self) -> bytes:
        return generate_latest(self.registry)
