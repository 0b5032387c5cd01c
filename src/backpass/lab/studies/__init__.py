"""Measurements of the commands ``attack``, ``transfer`` and ``demo``, one package each."""
