"""``flatout tune``: find settings that make a program faster, and prove that it computes the same."""
