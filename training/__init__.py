"""Training jobs: their configuration, queue and records. No torch, no Flask."""
