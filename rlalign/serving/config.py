"""What `rlalign serve-reward` is told."""

from pydantic import Field

from rlalign.settings import Settings

PORT = 8470


class ServeConfig(Settings):
    """How the service listens, batches and refuses."""

    host: str = "127.0.0.1"
    """Where it listens; anything wider than this machine needs a token."""
    port: int = Field(default=PORT, ge=0, le=65535)
    """0 takes a free one."""
    workers: int = Field(default=1, ge=1)
    """Processes that hold the reward."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of a worker."""
    gpus: tuple[str, ...] = ()
    """GPUs to deal out to the workers in turn; none: every worker sees all."""
    batch_size: int = Field(default=32, ge=1)
    """Pictures of one call, put together from requests that wait; a larger request is a call of its own."""
    batch_wait_s: float = Field(default=0.005, ge=0)
    """How long a request may wait for others to fill its batch."""
    fill: bool = False
    """Fill calls up to batch_size with copies of their last picture: numbers then do not depend on who else asks."""
    timeout_s: float = Field(default=60.0, gt=0)
    """A call that takes longer is given up, and its worker replaced unless it was a coroutine, which is cancelled."""
    max_mb: float = Field(default=64.0, gt=0)
    """A longer request is refused."""
    max_pictures: int = Field(default=1024, ge=1)
    """Pictures and frames of one request."""
    max_megapixels: float = Field(default=64.0, gt=0)
    """Of one request's pictures together, unpacked."""
    max_waiting: int = Field(default=256, ge=1)
    """Requests that are read, wait or are scored; above it, others are told to come again."""
    remember_s: float = Field(default=600.0, ge=0)
    """How long answers are kept for a request that is sent again with the same Idempotency-Key."""
    drain_s: float = Field(default=60.0, ge=0)
    """How long to finish what was accepted, when asked to end."""
