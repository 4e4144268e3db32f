"""For all tests."""

import signal

# A shell that starts the tests in the background has them ignore SIGINT, and so every child.
signal.signal(signal.SIGINT, signal.default_int_handler)
