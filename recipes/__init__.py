"""Which numbers we choose, each with its source. A recipe is a function that returns a Plan."""
