"""``backpass sde``: the stochastic differential equation of adversarial training."""

from importlib import import_module

# Each module registers its command when it is imported; the order is that of the help.
for _command in ("certify", "weak_error", "compare", "long_run", "control"):
    import_module(f"backpass.cli.sde.{_command}")
