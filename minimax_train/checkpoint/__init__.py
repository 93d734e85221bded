"""How state reaches the disk and comes back."""
