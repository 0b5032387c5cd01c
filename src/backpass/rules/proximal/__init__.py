"""Proximal weight steps: the direction of one layer, in the backward pass or over everything that contributed."""
