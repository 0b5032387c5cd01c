"""The laboratory: experiments on real data and networks.

Everything here needs the extra ``backpass[lab]``; nothing below (rules, attacks, sde, training) imports it.
"""
