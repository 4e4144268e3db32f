"""What knobs stand on: how calls of torch are watched, wrapped and replaced in a living process.

Everything that touches the user's torch or the user's objects does so from here. Imports the
standard library, torch and the wire; knows nothing of any knob.
"""
