"""Device memory, page-locked memory, streams, events and graphs; imports pycuda."""
