"""One program on several ranks: processes that replicate it and share out its root calls."""
