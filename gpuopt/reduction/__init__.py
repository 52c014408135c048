"""The smallest graph that still fails, or still differs: `gpuopt reduce`, and what `compile` keeps of a failure."""
