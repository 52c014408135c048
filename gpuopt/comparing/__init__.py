"""`gpuopt compare`: two reports side by side, and whether the new one is worse than was allowed."""
