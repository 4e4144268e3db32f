"""Counts how many calls each knob has handled in this process.

A knob that acts only on certain calls (an operator, a batch fetch, gradient clipping) may be
applied for a whole run and have no effect, if the program makes no such call. Only this count shows
that, and step times measured with such a knob say nothing about the knob.
"""

from __future__ import annotations

from collections import Counter

counts: Counter[str] = Counter()
"""The number of calls handled so far, by the name of the knob."""
