"""Gu and Guo, arXiv 2105.08037: what the stochastic differential equation of adversarial training is good for."""
