"""What the two halves exchange, and what both compute with. Standard library only."""
