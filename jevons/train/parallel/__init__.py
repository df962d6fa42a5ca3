"""Training on many processes, on torch's own parts: FSDP2, expert parallelism, pipelines, DCP."""
