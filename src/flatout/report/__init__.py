"""What the user sees: one file for each form of report."""
