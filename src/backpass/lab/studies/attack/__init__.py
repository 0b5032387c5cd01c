"""One network attacked with plain gradients and with those of rules."""
