"""The demo: the same network learns and is attacked with another backward pass."""
