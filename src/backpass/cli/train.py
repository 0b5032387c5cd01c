"""``backpass train``: train a network, also against an adversary, with any rule."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from backpass.cli import options as o
from backpass.cli import training_options as t
from backpass.cli.entry import app
from backpass.cli.printing import say, working

if TYPE_CHECKING:
    from backpass.lab.training.training_run import Trained

__all__ = ["train"]

_DIVERGED = 1  # the exit code of a run whose loss went out of bounds


@app.command(
    epilog="""[bold]Examples[/bold]

[green]backpass train --data mnist --model lenet5 --rule linbp:start=-2 --out runs/lenet5[/green]
  one epoch with linear backpropagation from the last two activations on

[green]backpass train --data my_images --model my_nets:Net --epochs 20 --augment crop,flip
--optimizer sgd:momentum=0.9,weight_decay=5e-4 --lr 0.1 --scheduler cosine --out runs/net[/green]
  your own network and images; Net stands in my_nets.py of this folder, and takes pixels in 0 to 1

[green]backpass train --data mnist --model lenet5 --adversary pgd:eps=0.2,steps=7 --out runs/robust[/green]
  adversarial training; with --trades 6 that of TRADES; --adversary-rule linbp:start=-2 makes the
  examples with linear backpropagation

[green]backpass train --recipe recipes/mnist-lenet5.toml --epochs 5 --out runs/longer[/green]
  a recipe, and what is different

[green]backpass train --resume --out runs/net[/green]  goes on where a run was stopped

[green]torchrun --nproc-per-node 2 -m backpass train --recipe runs/net/recipe.toml --out runs/two[/green]
  the same run in two processes, or on two GPUs with --device cuda"""
)
def train(
    data: t.Data = None,
    model: t.Model = None,
    recipe: t.Recipe = None,
    weights: t.Weights = None,
    normalize: t.Normalize = None,
    augment: t.Augment = None,
    limit: t.Limit = None,
    test_split: t.TestSplit = None,
    rules: t.Rules = None,
    optimizer: t.Optimizer = None,
    lr: t.Lr = None,
    scheduler: t.Scheduler = None,
    epochs: t.Epochs = None,
    batch_size: t.BatchSize = None,
    label_smoothing: t.LabelSmoothing = None,
    clip: t.Clip = None,
    average: t.Average = None,
    seed: t.Seed = None,
    adversary: t.Adversary = None,
    adversary_rule: t.AdversaryRule = None,
    trades: t.Trades = None,
    warmup: t.Warmup = None,
    robust: t.Robust = None,
    robust_images: t.RobustImages = None,
    robust_every: t.RobustEvery = None,
    stop_overfitting: t.StopOverfitting = None,
    dtype: t.Dtype = None,
    compiled: t.Compile = None,
    accumulate: t.Accumulate = None,
    device: o.Device = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the folder.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for weights, recipe, checkpoints and logs.")] = Path("runs/train"),
) -> None:
    """Train a network, also against an adversary, with any rule.

    The folder then holds the weights, which [green]backpass attack[/green] takes, and a recipe that repeats the run.
    """
    given: dict[str, Any] = {
        "data": data,
        "model": model,
        "rule": rules or None,
        "adversary": adversary,
        "adversary_rule": adversary_rule,
        "trades": trades,
        "warmup": warmup,
        "optimizer": optimizer,
        "lr": lr,
        "scheduler": scheduler,
        "epochs": epochs,
        "batch_size": batch_size,
        "accumulate": accumulate,
        "augment": augment,
        "limit": limit,
        "label_smoothing": label_smoothing,
        "clip": clip,
        "average": average,
        "dtype": dtype,
        "compile": compiled,
        "normalize": normalize,
        "robust": robust,
        "robust_images": robust_images,
        "robust_every": robust_every,
        "stop_overfitting": stop_overfitting,
        "weights": None if weights is None else str(weights),
        "test_split": test_split,
        "seed": seed,
    }
    with working("loading torch") as report:
        from backpass.lab.subjects import parse_device
        from backpass.lab.training.recipe import Recipe, read_recipe
        from backpass.lab.training.training_run import check_folder, device_of_this_process, is_first_process
        from backpass.lab.training.training_run import train as carry_out
        from backpass.training import Interrupted

        check_folder(out, resume)
        file = recipe or (out / "recipe.toml" if resume else None)
        values = read_recipe(file) if file else {}
        wanted = Recipe.of(
            {**values, **{name: value for name, value in given.items() if value is not None}},
            str(file) if file else "the command line",
        )
        where = device_of_this_process(parse_device(device))
        try:
            trained = carry_out(wanted, out, device=where, resume=resume, report=report, tell=say)
        except Interrupted as stopped:
            if is_first_process():
                say(f"backpass: {str(stopped).partition(':')[0]}. Go on: backpass train --resume --out {out}", err=True)
            raise typer.Exit(130) from None
    if is_first_process():
        _print(trained, out)
    if trained.result.diverged:
        raise typer.Exit(_DIVERGED)


def _print(trained: Trained, out: Path) -> None:
    result, recipe = trained.result, trained.recipe
    if result.diverged:
        say(f"\ndiverged: {result.diverged}. A lower --lr may help, and with linbp fewer linear sites.", err=True)
    numbers = [] if trained.accuracy is None else [f"test accuracy {trained.accuracy:.2%}"]
    if trained.robust_accuracy is not None:
        numbers.append(
            f"robust accuracy {trained.robust_accuracy:.1%} ({recipe.robust}, {recipe.robust_images} images)"
        )
    say("\n" + ", ".join(numbers))
    say(f"{result.seconds:.0f} s. Written: {trained.weights}, {out / 'recipe.toml'}, {out / 'log.jsonl'}")
    say(f"Attack it: {trained.next}")
