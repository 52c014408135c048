"""Adapters to the libraries that build and run engines."""
