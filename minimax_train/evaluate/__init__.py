"""How the model is judged."""
