"""``backpass transfer``: whether images that fool one network fool another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from backpass.cli import options as o
from backpass.cli.entry import app
from backpass.cli.printing import print_claims, print_findings, print_table, print_written, working

__all__ = ["transfer"]


@app.command(
    epilog="""[bold]Examples[/bold]

[green]backpass transfer --source my_nets:Small@small.safetensors --target my_nets:Large@large.safetensors
--data my_images --eps 8/255[/green]
  do images made against one network fool the other?

[green]backpass transfer --source my_nets:Small@small.pt --target my_nets:Large@large.pt --data cifar10
--attack pgd:steps=100 --eps 8/255 --rule bp --rule linbp:start=layer3[/green]
  do they transfer better when they are made with linear backpropagation?"""
)
def transfer(
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
    data: o.Data,
    eps: o.Eps,
    split: o.Split = "test",
    limit: o.Limit = None,
    attacks: o.Attacks = ["pgd"],  # noqa: B006  (typer copies it)
    step: o.Step = None,
    steps: o.Steps = None,
    restarts: o.Restarts = None,
    norm: o.Norm = None,
    loss: o.Loss = None,
    rules: o.Rules = ["bp"],  # noqa: B006
    protocol: o.ProtocolName = "standard",
    mean: o.Mean = None,
    std: o.Std = None,
    normalize: o.Normalize = False,
    logits: o.Logits = None,
    seed: o.Seed = 0,
    device: o.Device = "cpu",
    batch_size: o.BatchSize = 256,
    dtype: o.Dtype = None,
    out: Annotated[Path, typer.Option(help="Folder for report.html and result.json.")] = Path("runs/transfer"),
) -> None:
    """Attack some networks and show the images to others: the matrix of black-box success.

    Every image has every step: one that leaves as soon as it fools its source transfers worse.
    Rules are attached to the sources; the targets judge as they are.
    """
    given = o.Settings(
        step=step, steps=steps, restarts=restarts, norm=norm, loss=loss, dtype=dtype, logits=logits, seed=seed
    )
    with working("loading torch") as report:
        from backpass.lab.data import load_data
        from backpass.lab.numbers import read_number
        from backpass.lab.protocols import make_protocol
        from backpass.lab.report import write_report
        from backpass.lab.studies.attack.plans import make_plans
        from backpass.lab.studies.attack.study import check_rules, order_rules
        from backpass.lab.studies.transfer.measure import Study, measure
        from backpass.lab.studies.transfer.result import describe
        from backpass.lab.subjects import load_named, parse_device, short_names

        radii = [read_number(text, "--eps") for text in eps]
        ordered, where = order_rules(rules), parse_device(device)
        space = make_protocol(protocol, data, o.read_normalisation(mean, std))
        settings = {**given.as_options(), "early_stop": False}
        make_plans(attacks, radii, settings, space)  # a mistake there is better known before the data is read
        in_front = o.normalisation_in_front(normalize, mean, std, data=data, protocol=protocol)
        images = load_data(data, split=split).first(limit)
        for normalisation in filter(None, (in_front, getattr(space, "normalisation", None))):
            normalisation.check(images.images.pixels.shape[1])
        networks = load_named([*sources, *targets], device=where, seed=seed, normalisation=in_front, data=images)
        few = images.images.x[:2].to(where)
        for subject in networks.values():
            subject.try_on(few, data, images.classes)
        for spec in sources:
            check_rules(networks[spec], ordered, few, data)
        names = short_names(networks)
        out.mkdir(parents=True, exist_ok=True)
        study = Study(
            sources={names[spec]: networks[spec] for spec in sources},
            targets={names[spec]: networks[spec] for spec in targets},
            data=images,
            protocol=space,
            attacks=attacks,
            radii=radii,
            options=settings,
            rules=ordered,
            batch_size=batch_size,
            device=where,
        )
        measured = measure(study, report)
        result = describe(measured)
        written = write_report(result, out)
    for shown in result.tables:
        print_table(shown, columns=len(shown.columns))
    if result.claims:
        print_claims(result, "Rules compared, 95 % intervals")
    print_findings(result)
    print_written(measured.seconds, written)
