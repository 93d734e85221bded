"""How documents become batches: tokenise, index, mix, pack. Imports nothing of ours."""
