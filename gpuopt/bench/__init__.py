"""Measuring what was compiled: latency, throughput, memory."""
