"""``flatout tune``: find settings that are faster, and prove that they compute the same."""
