"""Static INT8: where Q/DQ go, and the graphs they make."""
