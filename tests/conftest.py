"""For all tests."""

import signal

# A shell that starts the tests in the background has them ignore SIGINT, and so every child; nohup
# has them ignore SIGHUP.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
