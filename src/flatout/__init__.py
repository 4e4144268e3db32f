"""Flatout: makes PyTorch programs run as fast as the machine allows, and proves the result.

This package never imports torch at its top level: the controller runs without it, and the agent
waits for the user's program to import it.
"""

__version__ = "0.1.0"
