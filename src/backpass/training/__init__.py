"""Training: any model, optimizer, rule and objective, resumable to the bit, in one or several processes."""
