"""Watching, wrapping and overriding torch in a running process, for knobs and the agent.

Only this package and the knobs touch the user's torch and objects. It imports the standard library,
torch, ``kernels``, ``wire`` and ``errors``, and does not depend on any knob.
"""
