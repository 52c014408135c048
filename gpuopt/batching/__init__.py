"""How a batching server will behave under a load: Triton's dynamic batcher simulated, and its settings chosen."""
