"""Metrics: what the server counts for Prometheus, in a registry of its own. One worker, so no multiprocess mode."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from inference.backend import InferenceBackend

LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
FIGURES = {  # of the engine's info, read when Prometheus asks
    "running": "sequences that run",
    "waiting": "sequences that wait",
    "waiting_tokens": "prompt tokens that wait",
    "tokens_per_second": "tokens generated per second of late",
    "heartbeat_age": "seconds since the engine's last sign of life",
    "cache_tokens": "tokens whose keys and values are kept, or have a place reserved",
    "cache_capacity": "tokens for which there is room",
    "cache_bytes": "bytes that cache_tokens take",
    "cache_saved": "prompt tokens of the loaded model that were found in the cache",
    "drafted_tokens": "tokens that greedy requests to the loaded model have drafted",
    "accepted_tokens": "drafted tokens that the model chose itself",
}


class Metrics:
    """Counters of requests and tokens, and gauges of the engine's figures."""

    def __init__(self, engine: InferenceBackend):
        self._engine = engine
        self.registry = CollectorRegistry()
        own = self.registry
        self.requests = Counter("lm_requests", "requests", ["method", "route", "status"], registry=own)
        self.latency = Histogram(
            "lm_request_seconds",
            "seconds to the reply, or to a stream's start",
            ["route"],
            registry=own,
            buckets=LATENCY,
        )
        self.prompt_tokens = Counter("lm_prompt_tokens", "prompt tokens of generation requests", registry=own)
        self.generated_tokens = Counter("lm_generated_tokens", "tokens generated", registry=own)
        self.model = Gauge("lm_model_loaded", "1 for the loaded model", ["id", "runner", "dtype"], registry=own)
        self.figures = {name: Gauge(f"lm_{name}", help, registry=own) for name, help in FIGURES.items()}

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one request."""
        self.requests.labels(method, route, str(status)).inc()
        self.latency.labels(route).observe(seconds)

    def text(self) -> bytes:
        """Return everything in Prometheus' text format."""
        info, served = self._engine.info(), self._engine.served()
        for name, gauge in self.figures.items():
            gauge.set(info[name])
        self.model.clear()
        if served is not None:
            self.model.labels(served.id, served.runner, served.dtype).set(1)
        return bytes(generate_latest(self.registry))
