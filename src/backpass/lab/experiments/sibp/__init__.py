"""SIBP: Liu, Zhang, Semi-Implicit Back Propagation."""
