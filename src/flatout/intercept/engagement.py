"""How often each knob was engaged in this process: how many calls it has taken into its hands.

A knob that waits for calls (an operator, a batch, a clipped gradient) may be in place for a whole
run and do nothing. Only a count can tell: a time measured with it says nothing about it then.
"""

from __future__ import annotations

from collections import Counter

calls: Counter[str] = Counter()
"""Calls taken so far, by the name of the knob."""
