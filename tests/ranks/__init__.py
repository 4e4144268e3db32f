"""Programs that run by one process and by several ranks."""
