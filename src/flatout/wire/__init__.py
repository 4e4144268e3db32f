"""File formats exchanged between controller and agent, and code used by both.

That code detects steps in the recorded events, and computes ratios of step times. These files
import only the standard library and ``flatout.text``, because the agent loads them inside the
user's program.
"""
