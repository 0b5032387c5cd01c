"""Semi-implicit steps: a layer's weight step, and its neurons through the updated weights."""
