"""Reports for people: the terminal, the words of a result, and its page."""
