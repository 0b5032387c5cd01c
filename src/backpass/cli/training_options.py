"""The options of ``backpass train``; each overrides the key of its name in a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = [
    "Accumulate",
    "Adversary",
    "AdversaryRule",
    "Augment",
    "Average",
    "BatchSize",
    "Clip",
    "Compile",
    "Data",
    "Dtype",
    "Epochs",
    "LabelSmoothing",
    "Limit",
    "Lr",
    "Model",
    "Normalize",
    "Optimizer",
    "Recipe",
    "Robust",
    "RobustEvery",
    "RobustImages",
    "Rules",
    "Scheduler",
    "Seed",
    "StopOverfitting",
    "TestSplit",
    "Trades",
    "Warmup",
    "Weights",
]

_WHAT = {"rich_help_panel": "What is learned"}
_HOW = {"rich_help_panel": "How"}
_AGAINST = {"rich_help_panel": "Against an adversary"}
_SPEED = {"rich_help_panel": "Speed and memory"}
_NAMED: dict[str, Any] = {"metavar": "NAME[:SETTINGS]"}

Data = Annotated[
    str | None,
    typer.Option(help="As for attack; its part train is learned from.", metavar="NAME|FOLDER", **_WHAT),
]
Model = Annotated[
    str | None,
    typer.Option(
        help="A lab network, as in lenet5 or mlp:widths=400-200, or your own as module:callable.",
        metavar="SPEC",
        **_WHAT,
    ),
]
Recipe = Annotated[
    Path | None, typer.Option(help="A TOML file with any of these settings; options override it.", **_WHAT)
]
Weights = Annotated[Path | None, typer.Option(help="Start from the weights of a file.", show_default="random", **_WHAT)]
Normalize = Annotated[
    bool | None,
    typer.Option(
        "--normalize/--no-normalize",
        help="Lab networks normalise images of known data first.",
        show_default="yes",
        **_WHAT,
    ),
]
Augment = Annotated[
    str | None,
    typer.Option(help="crop, crop=2 (pixels of border), flip, or several.", show_default="none", **_WHAT),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Learn from so many images only.", show_default="all", **_WHAT)]
TestSplit = Annotated[str | None, typer.Option(help="The part of the data to judge by.", show_default="test", **_WHAT)]

Rules = Annotated[
    list[str] | None,
    typer.Option(
        "--rule",
        help="For the gradients of the weights, as in linbp:start=-2. Repeatable.",
        show_default="bp",
        **_NAMED,
        **_HOW,
    ),
]
Optimizer = Annotated[
    str | None,
    typer.Option(
        help="sgd, adam, adamw, adagrad or rmsprop, with torch's settings.",
        show_default="sgd:momentum=0.9",
        **_NAMED,
        **_HOW,
    ),
]
Lr = Annotated[float | None, typer.Option(help="The learning rate.", show_default="sgd 0.01, adam 0.001", **_HOW)]
Scheduler = Annotated[
    str | None,
    typer.Option(
        help="cosine, linear, step:every=30,gamma=0.1, exponential:gamma=0.98; or controlled, by measurements.",
        show_default="constant",
        **_NAMED,
        **_HOW,
    ),
]
Epochs = Annotated[int | None, typer.Option(min=1, help="Passes over the images.", show_default="1", **_HOW)]
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Images per step, over all processes.", show_default="64", **_HOW)
]
LabelSmoothing = Annotated[
    float | None, typer.Option(help="Of the cross-entropy, in 0 to 1.", show_default="0", **_HOW)
]
Clip = Annotated[float | None, typer.Option(help="Upper limit of the gradient's norm.", show_default="none", **_HOW)]
Average = Annotated[
    str | None,
    typer.Option(help="Save averaged weights: ema:0.999, or polyak:0.5, of the last half.", show_default="no", **_HOW),
]
Seed = Annotated[
    int | None, typer.Option(help="Of weights, order, augmentation and adversary.", show_default="0", **_HOW)
]

Adversary = Annotated[
    str | None,
    typer.Option(
        help="Learn from this attack's examples, as in pgd:eps=8/255,steps=10.",
        show_default="none",
        **_NAMED,
        **_AGAINST,
    ),
]
AdversaryRule = Annotated[
    str | None,
    typer.Option(help="For the adversary's gradients.", show_default="bp", **_NAMED, **_AGAINST),
]
Trades = Annotated[float | None, typer.Option(help="Beta of TRADES.", show_default="PGD training", **_AGAINST)]
Warmup = Annotated[int | None, typer.Option(min=0, help="Epochs until eps is reached.", show_default="0", **_AGAINST)]
Robust = Annotated[
    str | None,
    typer.Option(
        help="Attack that measures robust accuracy after epochs; none for none.",
        show_default="with an adversary PGD, 20 steps",
        **_NAMED,
        **_AGAINST,
    ),
]
RobustImages = Annotated[
    int | None, typer.Option(min=1, help="On how many test images.", show_default="500", **_AGAINST)
]
RobustEvery = Annotated[int | None, typer.Option(min=1, help="Every so many epochs.", show_default="1", **_AGAINST)]
StopOverfitting = Annotated[
    bool | None,
    typer.Option(
        "--stop-overfitting/--no-stop-overfitting",
        help="End a run that withstands its own adversary alone.",
        show_default="no",
        **_AGAINST,
    ),
]

Dtype = Annotated[
    str | None,
    typer.Option(help="bfloat16, or on a GPU float16: compute in it.", show_default="float32", **_SPEED),
]
Compile = Annotated[
    bool | None,
    typer.Option("--compile/--no-compile", help="Compile the network.", show_default="no", **_SPEED),
]
Accumulate = Annotated[
    int | None, typer.Option(min=1, help="Parts in which a step is computed.", show_default="1", **_SPEED)
]
