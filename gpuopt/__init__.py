"""gpuopt: from a PyTorch model to an inference engine that a release pipeline can trust."""

__version__ = "0.1.0"
