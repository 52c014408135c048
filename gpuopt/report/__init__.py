"""The report: its model, and pure functions that render it."""
