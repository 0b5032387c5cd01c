"""Transferability of adversarial images between networks."""
