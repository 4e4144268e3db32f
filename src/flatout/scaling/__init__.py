"""Predicts the time of a step with other numbers of ranks, over a measured or a named network."""
