"""Starting a job under the agent: environment, process, isolation. See ``start``."""
