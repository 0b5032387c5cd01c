"""``backpass transfer``: show images made against some networks to others."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from backpass.cli import options as o
from backpass.cli.entry import app
from backpass.cli.printing import (
    print_claims,
    print_findings,
    print_table,
    print_written,
    told_when_interrupted,
    working,
)
from backpass.cli.processes import processes
from backpass.errors import BackpassError

__all__ = ["transfer"]


@app.command(
    epilog="""[bold]Examples[/bold]

[green]backpass transfer --source my_nets:Small@small.safetensors --target my_nets:Large@large.safetensors
--data my_images --eps 8/255[/green]
  do images made against one network fool the other?

[green]backpass transfer --source my_nets:Small@small.pt --target my_nets:Large@large.pt --data cifar10
--attack pgd:steps=100 --eps 8/255 --rule bp --rule linbp:start=layer3[/green]
  do they transfer better when they are made with linear backpropagation?

[green]backpass transfer --source my_nets:Small@small.pt --target my_nets:Large@large.pt --data cifar10 --eps 8/255
--attack ifgsm --attack mifgsm:diversity=0.7,translation=3,scales=5 --rule bp --rule sgm --gradients 100[/green]
  which attack and which rule transfer best, at 100 gradients of each image?"""
)
@o.with_attack_options
def transfer(
    *,
    sources: Annotated[
        list[str],
        typer.Option(
            "--source",
            help="A network to attack: a lab network or module:callable, with its file of weights after an @. "
            "Repeatable.",
            metavar="SPEC[@FILE]",
        ),
    ],
    targets: Annotated[
        list[str],
        typer.Option("--target", help="A network to show the images to. Repeatable.", metavar="SPEC[@FILE]"),
    ],
    gradients: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Gradients of each image, instead of --steps: every attack and rule gets as many steps as they allow, "
            "without restarts.",
            show_default="the attack's steps",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for report.html and result.json.")] = Path("runs/transfer"),
    given: o.AttackOptions,
) -> None:
    """Attack some networks and show the images to others: the matrix of black-box success.

    Every search runs all its steps: an image that only just fools its source transfers worse.
    Rules are attached to the sources. Targets are evaluated without rules.
    """
    with ExitStack() as stack:
        stack.enter_context(told_when_interrupted("Finished parts are kept: --resume goes on with them."))
        report = stack.enter_context(working("loading torch"))
        from backpass.data import load_data
        from backpass.data.class_map import match_classes
        from backpass.experiments.experiment import Context
        from backpass.experiments.running import run_here
        from backpass.experiments.studies import Study, check_rules, order_rules
        from backpass.experiments.transfer_study import transfer_experiment, transfer_result
        from backpass.lab.plans import make_plans, mixing_pool
        from backpass.lab.subjects import load_named, parse_device, short_names
        from backpass.report.page import write_report

        ordered, (where, first) = order_rules(given.rules), stack.enter_context(processes(parse_device(given.device)))
        radii, space, in_front = given.radii(), given.space(), given.in_front()
        settings = {**given.settings(), "early_stop": False}
        # A mistake there is better known before the data is read.
        plans = make_plans(given.attacks, radii, settings, space, gradients)
        images = load_data(given.data, split=given.split).first(given.limit)
        for normalisation in filter(None, (in_front, getattr(space, "normalisation", None))):
            normalisation.check(images.images.pixels.shape[1])
        networks = load_named([*sources, *targets], device=where, seed=given.seed, normalisation=in_front, data=images)
        few = images.images.x[:2].to(where)
        classes = None if given.classes or images.folders else images.classes
        outputs = {s.name: s.try_on(few, given.data, classes, settings["logits"]) for s in networks.values()}
        if len(set(outputs.values())) > 1:
            raise BackpassError(f"the networks have different numbers of outputs: {outputs}. Their classes must agree.")
        some = next(iter(outputs.values()))
        images = match_classes(images, given.classes, some or images.classes, sources[0])
        for spec in sources:
            check_rules(networks[spec], ordered, few, given.data)
        settings |= mixing_pool(plans, images, space)
        names = short_names(networks)
        study = Study(
            sources={names[spec]: networks[spec] for spec in sources},
            targets={names[spec]: networks[spec] for spec in targets},
            data=images,
            protocol=space,
            attacks=given.attacks,
            radii=radii,
            options=settings,
            rules=ordered,
            batch_size=given.batch_size,
            device=where,
            shards=o.open_shards(out, given.resume, first),
            target=given.target_class(images.class_names),
            gradients=gradients,
        )
        done = run_here(transfer_experiment(study), f"protocol {space.name}", out=out,
                        context=Context(device=where, loaded=study), store=first, progress=report)  # fmt: skip
        if done is None:
            return
        result = transfer_result(study, *done)
        written = write_report(result, out)
    for shown in result.tables:
        print_table(shown, columns=len(shown.columns))
    if result.claims:
        print_claims(result, "Rules compared, 95 % intervals")
    print_findings(result)
    print_written(result.environment["seconds"], written)
