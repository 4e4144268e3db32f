"""``flatout tune``: candidates, trials, statistics, proof, plan."""
