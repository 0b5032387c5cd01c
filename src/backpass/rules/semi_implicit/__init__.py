"""Semi-implicit back propagation: implicit weight steps, and input gradients through the updated weights."""
