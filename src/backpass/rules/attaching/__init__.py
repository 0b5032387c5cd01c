"""The one mechanism: how a rule comes to stand between a model and its backward pass."""
