"""TensorRT proper (8.5 and newer) and TensorRT-RTX, each the Python module of a target."""
