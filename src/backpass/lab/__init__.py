"""The laboratory: real data, networks, experiments, and reports that say with intervals what holds.

Everything here needs the extra ``backpass[lab]``; nothing below (rules, attacks, sde, training) imports it.
"""
