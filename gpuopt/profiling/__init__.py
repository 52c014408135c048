"""Where the time of a compiled model goes, layer by layer, and what bounds each layer."""
