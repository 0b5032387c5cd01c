"""Attaching rules to models: interception of torch functions and selection of sites."""
