"""Formats results as terminal text and as an HTML page."""
