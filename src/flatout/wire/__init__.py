"""What the controller and the agent exchange, and what both compute with.

These files import only the standard library, because the agent loads them inside the user's
program.
"""
