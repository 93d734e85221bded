"""How documents become batches: tokenise, index, pack. Imports nothing of ours."""
