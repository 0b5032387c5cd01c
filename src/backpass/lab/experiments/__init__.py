"""The papers' experiments: a folder for each paper, a file for each family of figures and tables."""
