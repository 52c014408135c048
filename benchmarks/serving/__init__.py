"""What `benchmarks/batching.py` runs in other processes: a backend for Triton, and a client."""
