"""NVIDIA Triton Inference Server: a bundle as a model repository, and whether a repository fits its engine."""
