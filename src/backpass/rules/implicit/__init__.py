"""Layers that are linear in their weights: what calls them, what their rows are, and the rows' Gram matrices."""
