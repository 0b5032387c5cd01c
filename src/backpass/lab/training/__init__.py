"""Training runs: from names on a command line or in a recipe to a trained network in a folder."""
