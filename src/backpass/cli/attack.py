"""``backpass attack``: attack a network with plain gradients and with those of rules."""

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

__all__ = ["attack"]


@app.command(
    epilog="""[bold]Examples[/bold]

[green]backpass attack --model my_nets:Net --weights net.safetensors --data my_images --eps 8/255[/green]
  your own network and images; Net stands in my_nets.py of this folder, and takes pixels in 0 to 1

[green]backpass attack --model my_nets:Net --weights net.pt --data cifar10 --limit 1000 --normalize
--attack pgd --attack apgd --eps 4/255 --eps 8/255 --restarts 5[/green]
  a network that expects normalised images; two attacks at two radii

[green]backpass attack --model my_nets:Net --weights net.pt --data cifar10 --eps 8/255
--rule bp --rule linbp:start=layer4[/green]
  is a stronger attack hiding behind plain gradients?

[green]backpass attack --model my_nets:Net --weights net.pt --data cifar10 --eps 8/255 --limit 1000
--rule bp --rule linbp:start=auto[/green]
  the same, from where it does best on images that are not attacked

[green]backpass attack --model my_nets:Net --weights net.pt --data cifar10 --eps 8/255 --eps 16/255
--protocol paper --rule bp --rule linbp:start=layer4[/green]
  as in the paper on linear backpropagation

[green]... --attack apgd:steps=50,loss=dlr --attack square:queries=500[/green]
  settings of one attack alone

[green]... --resume --out runs/attack[/green]  goes on where a run was stopped"""
)
@o.with_attack_options
def attack(
    *,
    model: Annotated[
        str,
        typer.Option(
            help="A lab network, as in mlp or resnet18:activation=silu; your own as module:callable, which is imported "
            "and called; or timm:NAME, torchvision:NAME or robustbench:NAME with its weights.",
            metavar="SPEC",
        ),
    ],
    weights: Annotated[
        Path | None,
        typer.Option(
            help="safetensors or torch.save of a state dict; never runs code.", show_default="its own initial ones"
        ),
    ] = None,
    curves: Annotated[
        int,
        typer.Option(min=0, help="Images for the curves of success against eps and steps; 0 leaves them out."),
    ] = 200,
    out: Annotated[Path, typer.Option(help="Folder for report.html and result.json.")] = Path("runs/attack"),
    given: o.AttackOptions,
) -> None:
    """Attack a network: clean and robust accuracy, success with intervals, a report with images.

    Several attacks, radii and rules are measured on the same images, from the same random starts.
    Rules are compared image by image; success is judged on the plain network in float32.
    """
    with ExitStack() as stack:
        stack.enter_context(told_when_interrupted("Finished parts are kept: --resume goes on with them."))
        report = stack.enter_context(working("loading torch"))
        from backpass.data import load_data
        from backpass.data.class_map import match_classes
        from backpass.experiments.attack_report import attack_result
        from backpass.experiments.attack_study import attack_experiment
        from backpass.experiments.experiment import Context
        from backpass.experiments.placing import Placing, place, set_aside
        from backpass.experiments.running import run_here
        from backpass.experiments.studies import Study, check_rules, order_rules
        from backpass.lab.plans import make_plans, mixing_pool
        from backpass.lab.subjects import load_subject, parse_device
        from backpass.report.page import write_report

        ordered, (where, first) = (
            order_rules(given.rules, model),
            stack.enter_context(processes(parse_device(given.device))),
        )
        radii, space, settings, in_front = given.radii(), given.space(), given.settings(), given.in_front()
        # A mistake there is better known before the data is read.
        plans = make_plans(given.attacks, radii, settings, space)
        images, aside = set_aside(load_data(given.data, split=given.split), given.limit, ordered)
        subject = load_subject(model, weights, device=where, seed=given.seed, normalisation=in_front, data=images)
        for normalisation in filter(None, (in_front, getattr(space, "normalisation", None))):
            normalisation.check(images.images.pixels.shape[1])
        few = images.images.x[:2].to(where)
        classes = None if given.classes or images.folders else images.classes
        outputs = subject.try_on(few, given.data, classes, settings["logits"])
        images = match_classes(images, given.classes, outputs or images.classes, model)
        aside = aside and match_classes(aside, given.classes, outputs or images.classes, model)
        check_rules(subject, ordered, few, given.data)
        settings |= mixing_pool(plans, images, space)
        study = Study(
            sources={model: subject},
            data=images,
            protocol=space,
            attacks=given.attacks,
            radii=radii,
            options=settings,
            rules=ordered,
            batch_size=given.batch_size,
            device=where,
            swept=curves,
            shown=_SHOWN,
            shards=o.open_shards(out, given.resume, first),
            target=given.target_class(images.class_names),
        )
        placings: dict[str, Placing] = {}
        if aside is not None:
            report("choose where LinBP starts", 0.0)
            study, placings = place(study, aside)
        done = run_here(attack_experiment(study), f"protocol {space.name}", out=out,
                        context=Context(device=where, loaded=study), store=first, progress=report)  # fmt: skip
        if done is None:
            return
        result = attack_result(study, *done, placings)
        written = write_report(result, out)
    for shown in result.tables[: len(given.attacks)]:
        print_table(shown, columns=4)
    if result.claims:
        print_claims(result, "Rules compared on the same images, 95 % intervals")
    print_findings(result)
    print_written(result.environment["seconds"], written)


_SHOWN = 6  # images in the report
