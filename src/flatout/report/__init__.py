"""Reports for people: what the other parts found, printed."""
