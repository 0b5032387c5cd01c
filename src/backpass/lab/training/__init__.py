"""Training runs from text forms on the command line or in a recipe."""
