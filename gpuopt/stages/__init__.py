"""The stages of the pipeline, one file each with one `run` function."""
