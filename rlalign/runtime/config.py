"""The runtime block of a run file."""

from typing import Literal

from pydantic import Field, model_validator

from rlalign.settings import Settings

Labels = dict[str, str]


class RuntimeConfig(Settings):
    """On which machines, and how many of what."""

    kind: Literal["local", "ray"] = "local"
    """local: all in this process; ray: every worker in a process of its own, on one machine or many."""
    address: str | None = None
    """Of a running Ray cluster, as host:port or auto; null: RAY_ADDRESS, or else a cluster of this run's own here."""
    samplers: int = Field(default=1, ge=1)
    """Workers that make samples; the numbers do not depend on it."""
    min_samplers: int | None = Field(default=None, ge=1)
    """Start with so many, the others join as machines come; null: wait for all."""
    scorers: int = Field(default=1, ge=1)
    """Workers that compute rewards."""
    learners: int = Field(default=1, ge=1)
    """Ranks that share every update; part of the numbers, since it decides the order of sums."""
    threads_per_worker: int = Field(default=1, ge=1)
    """CPU threads of a worker; part of the numbers, since they decide the order of sums."""
    max_staleness: int = Field(default=0, ge=0)
    """How many versions the weights that sample may lag behind those that learn; 0 is synchronous."""
    device: str = Field(default="auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    """auto takes the first GPU, and the CPU where there is none."""
    cpus_per_worker: float = Field(default=1.0, ge=0)
    """CPUs that a worker reserves on a cluster."""
    gpus_per_sampler: float | None = Field(default=None, ge=0)
    """GPUs of each sampler, fractions allowed; null: 1 where the cluster has GPUs (0.5 colocated), else 0."""
    gpus_per_scorer: float = Field(default=0.0, ge=0)
    """GPUs of each scorer; 0.25 lets four share one. Shares are bookkeeping: they do not limit GPU memory."""
    gpus_per_learner: float | None = Field(default=None, ge=0)
    """GPUs of each learner rank, fractions allowed; null: 1 where the cluster has GPUs (0.5 colocated), else 0."""
    placement: Literal["disaggregated", "colocated"] = "disaggregated"
    """colocated: sampler i shares a machine and GPU with learner rank i, as many of one as of the other; their shares
    must add up to at most 1."""
    offload_idle: bool = False
    """Colocated samplers and learner ranks take turns on their GPU: whoever waits has its weights in CPU memory."""
    sampler_labels: Labels = Field(default_factory=dict)
    """Only on machines with these Ray labels, such as {gpu: h100}."""
    scorer_labels: Labels = Field(default_factory=dict)
    """The same for scorers."""
    learner_labels: Labels = Field(default_factory=dict)
    """The same for learner ranks."""
    join_timeout_s: float = Field(default=0.0, ge=0)
    """How long to wait at the start for machines that are still to join, by an autoscaler or a scheduler."""
    scorer_memory_gib: float | None = Field(default=None, gt=0)
    """What a scorer process may allocate before its reward gets a MemoryError; null: no limit. CPU rewards only."""
    transport: Literal["object_store", "collective"] = "object_store"
    """How weights reach samplers; collective is a private group per set of live samplers, with the store behind it."""
    canary_every: int = Field(default=10, ge=0)
    """Versions between two checks that samplers predict what the learner predicts; 0: only their first version."""
    call_timeout_s: float = Field(default=1800.0, gt=0)
    """A sampler or scorer that works on one unit for longer is replaced, and any worker that takes longer to start."""
    ping_timeout_s: float = Field(default=30.0, gt=0)
    """A process that does not answer for so long is replaced."""
    restarts: int = Field(default=5, ge=0)
    """How often in a row a worker may die without finishing anything, and the learners without a checkpoint."""
    machine_timeout_s: float = Field(default=3600.0, gt=0)
    """Without a machine for any sampler, any scorer or the learners, the run says so every minute, and then ends."""
    spares: bool = True
    """Keep one more process on every machine, which has imported everything and follows a sampler or scorer that dies;
    for workers without a GPU."""
    in_flight_gib: float = Field(default=8.0, gt=0)
    """Trajectories and pictures on their way; above it, no unit of a later step is started."""

    @model_validator(mode="after")
    def _fits(self) -> "RuntimeConfig":
        if self.min_samplers is not None and self.min_samplers > self.samplers:
            raise ValueError(f"min_samplers {self.min_samplers} exceeds samplers {self.samplers}")
        if self.kind == "local" and self.learners > 1:
            raise ValueError(f"{self.learners} learners need runtime.kind ray: in one process there is one")
        if self.offload_idle and (self.kind, self.placement, self.transport) != ("ray", "colocated", "object_store"):
            raise ValueError("offload_idle needs kind: ray, placement: colocated and transport: object_store")
        if self.offload_idle and self.max_staleness:
            raise ValueError("offload_idle needs max_staleness 0: else samplers and learners work at the same time")
        return self
