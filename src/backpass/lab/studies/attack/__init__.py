"""Attacks on one network with plain gradients and under backward rules."""
