"""Where a bundle comes from, in two standard documents: pure functions that render what is known of a run."""
