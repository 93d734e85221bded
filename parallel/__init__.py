"""Other ranks: layout, process groups, exchanges. Imports nothing of ours."""
