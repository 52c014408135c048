"""Device memory, page-locked memory, streams, events and graphs; imports pycuda, and is used by backends alone."""
