"""Counts how many calls each knob has handled in this process.

A knob that waits for calls (of an operator, for a batch, for a clipped gradient) may be applied for
a whole run and have no effect. Only this count shows it, and step times measured with such a knob
say nothing about it.
"""

from __future__ import annotations

from collections import Counter

calls: Counter[str] = Counter()
"""Calls handled so far, by the name of the knob."""
