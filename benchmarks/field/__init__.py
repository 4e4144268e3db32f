"""Programs that others maintain, as their users start them, under flatout."""
