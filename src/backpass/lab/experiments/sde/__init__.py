"""Gu and Guo, arXiv 2105.08037v1: experiments with the SDE of adversarial training."""
