"""The command line: `ltseg run | train | figures | stats | report | doctor`. Heavy imports wait for the command."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ltseg_core import __version__
from ltseg_core.config import PROFILES, Experiment, UserError, profile

app = typer.Typer(
    help="Long-tailed semantic segmentation: five papers and their baselines under one protocol.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog="First time? [bold]ltseg doctor[/] says what this machine has, [bold]ltseg run 00[/] starts the tour.",
)

DataRoot = Annotated[
    Path | None, typer.Option(help="Folder of the data sets.", envvar="LTSEG_DATA", show_default="./data")
]
Runs = Annotated[
    Path | None, typer.Option(help="Folder of the run directories.", envvar="LTSEG_RUNS", show_default="./runs")
]
Set = Annotated[
    list[str] | None, typer.Option("-p", "--parameter", help="name=value, repeatable; the value is read as YAML.")
]
ProfileName = Annotated[str, typer.Option("--profile", help=f"One of {', '.join(PROFILES)}.")]


def _assignments(pairs: list[str] | None) -> dict[str, Any]:
    """`["steps=5", "hyper.sigma=6"]` -> {"steps": 5, "hyper": {"sigma": 6}}."""
    import yaml

    values: dict[str, Any] = {}
    for pair in pairs or []:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise UserError(f"-p takes name=value, got {pair!r}")
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError) as error:  # ValueError: 2020-13-45
            raise UserError(f"the value of -p {pair!r} is not valid YAML ({' '.join(str(error).split())})") from None
        outer, dot, inner = name.partition(".")
        if dot:
            mapping = values.setdefault(outer, {})
            if not isinstance(mapping, dict):
                raise UserError(f"-p {pair} adds to a mapping, but an earlier -p set {outer} to {mapping!r}: drop one")
            mapping[inner] = value
        else:
            values[name] = value
    return values


def _export(**variables: Path | None) -> None:
    """Hand a folder to the notebooks' kernels through the environment."""
    for name, value in variables.items():
        if value is not None:
            os.environ[name] = str(value.expanduser().resolve())


@app.callback(invoke_without_command=True)
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"ltseg {__version__}")
        raise typer.Exit


@app.command()
def run(
    notebooks: Annotated[list[str] | None, typer.Argument(help="Numbers or names; default: all.")] = None,
    profile: ProfileName = "quick",
    out: Annotated[Path, typer.Option(help="Folder for executed notebooks and figures.")] = Path("out"),
    jobs: Annotated[int, typer.Option(help="Notebooks side by side; 0 chooses.", min=0)] = 0,
    scheduler: Annotated[str | None, typer.Option(help="Run on this Dask cluster, tcp://host:port.")] = None,
    parameter: Set = None,
    force: Annotated[bool, typer.Option("--force", help="Run notebooks again that are up to date.")] = False,
    data_root: DataRoot = None,
    runs: Runs = None,
) -> None:
    """Execute the notebooks headless, in order; `ltseg report` makes one site of them.

    Examples:

      ltseg run                              everything, embedded scenes

      ltseg run 02 --profile camvid_cpu      one notebook on CamVid

      ltseg run 02 -p seeds=[0] -p steps=50  with parameters of its first cell
    """
    from ltseg_core import collection

    _export(LTSEG_DATA=data_root, LTSEG_RUNS=runs)
    outcome = collection.run(
        notebooks,
        profile=profile,
        out=out,
        jobs=jobs,
        scheduler=scheduler,
        parameters=_assignments(parameter),
        force=force,
    )
    typer.echo(collection.summary(outcome, out))
    if any(result.failed for result in outcome):
        raise typer.Exit(1)


@app.command()
def train(
    experiment: Annotated[Path | None, typer.Argument(help="YAML or JSON file of an experiment.")] = None,
    profile_name: Annotated[
        str | None, typer.Option("--profile", help=f"One of {', '.join(PROFILES)}.", show_default="quick")
    ] = None,
    method: Annotated[str | None, typer.Option(help="e.g. ce, balanced_softmax, blv.")] = None,
    dataset: Annotated[str | None, typer.Option(help="scenes, camvid, ccp, cifar100, or a folder (with a /).")] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    steps: Annotated[int | None, typer.Option()] = None,
    parameter: Set = None,
    tracker: Annotated[str | None, typer.Option(help="Also log to tensorboard, mlflow or wandb.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that decode images of large data sets.", min=0)] = 0,
    data_root: DataRoot = None,
    runs: Runs = None,
) -> None:
    """Train one experiment, or show its finished run.

    Examples:

      ltseg train --method blv --seed 1

      ltseg train --profile camvid_cpu --method ce -p steps=100

      ltseg train experiment.yaml -p hyper.sigma=4

      accelerate launch --multi_gpu --num_processes 2 -m ltseg_core.cli train --method ce
    """
    if experiment and profile_name:
        raise UserError(f"give the experiment file {experiment} or --profile {profile_name}, not both")
    changes = Experiment.named(_assignments(parameter))
    given = {"method": method, "dataset": dataset, "seed": seed, "steps": steps}
    changes |= {name: value for name, value in given.items() if value is not None}
    base = Experiment.from_file(experiment).to_dict() if experiment else dict(profile(profile_name or "quick").settings)
    for name, value in changes.items():  # hyper.sigma=4 adds to the mapping, it does not replace it
        both = isinstance(value, dict) and isinstance(base.get(name), dict)
        base[name] = {**base[name], **value} if both else value
    wanted = Experiment.from_dict(base)

    from ltseg_core.train import fit

    finished = fit(wanted, data_root=data_root, runs=runs, tracker=tracker, workers=workers)
    if os.environ.get("RANK", "0") != "0":  # one of several processes of `accelerate launch`
        return
    table = finished.metrics.query("class_id == -1 and group == 'all'").pivot(
        index="metric", columns="split", values="value"
    )
    typer.echo(table.round(4).to_string())
    typer.echo(f"run directory: {finished.path}")


@app.command()
def figures(
    notebooks: Annotated[list[str] | None, typer.Argument(help="Numbers or names; default: all.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the figures.")] = Path("figures"),
    profile: ProfileName = "quick",
    data_root: DataRoot = None,
    runs: Runs = None,
) -> None:
    """Regenerate figures and tables from finished runs; trains nothing.

    Examples:

      ltseg figures --out figures/

      ltseg figures 02 07
    """
    from ltseg_core.redraw import redraw

    failed = redraw(notebooks, figures=out, profile=profile, runs=runs, data_root=data_root)
    typer.echo(f"{len(list(out.glob('*.png')))} figures in {out}")
    if failed:
        raise typer.Exit(1)


@app.command()
def stats(
    dataset: Annotated[str, typer.Argument(help="scenes, camvid, ccp, cifar100, or a folder (with a /).")],
    split: Annotated[str, typer.Option()] = "train",
    parameter: Set = None,
    data_root: DataRoot = None,
) -> None:
    """Class counts, head/body/tail groups and imbalance factors of any data set.

    Examples:

      ltseg stats camvid --split test

      ltseg stats ./my_folder
    """
    from rich.console import Console
    from rich.table import Table

    from ltseg_core import data
    from ltseg_core import stats as statistics

    wanted = Experiment(dataset=dataset, data_options=_assignments(parameter))
    loaded = data.load(wanted.dataset, split, data_root, **wanted.data_options)
    counts = statistics.count_classes(loaded)
    share, group = counts.pixel_share(), statistics.groups(counts)
    table = Table(
        "class", "pixels", "share", "images", "group", title=f"{loaded.name}, {loaded.split}: {len(loaded)} images"
    )
    for i in counts.pixels.argsort(descending=True).tolist():
        row = (f"{counts.pixels[i]:,}", f"{share[i]:.3%}", f"{counts.images[i]:,}", group[i])
        table.add_row(loaded.classes[i], *row)
    Console().print(table)
    pixel_factor, region_factor = statistics.imbalance_factors(counts)
    typer.echo(
        f"imbalance factor (max/min over classes that occur): pixels {pixel_factor:.2f}, images {region_factor:.2f}"
    )


@app.command()
def report(
    out: Annotated[Path, typer.Option(help="Folder that `ltseg run --out` filled.")] = Path("out"),
) -> None:
    """Build one static site in OUT/site: executed notebooks, claims board, a page for each method.

    It opens from the file system and loads nothing from the network.

    Example: ltseg report --out out
    """
    from ltseg_core import report

    typer.echo(f"report: {report.build(out)}")


@app.command()
def doctor(data_root: DataRoot = None) -> None:
    """Say what this machine has: devices, versions, data sets found, free disk.

    Example: ltseg doctor
    """
    import shutil
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from ltseg_core import config, data

    root = config.data_root(data_root)
    typer.echo(f"ltseg {__version__}, Python {sys.version.split()[0]}, {os.cpu_count()} cores")
    for name in (
        "torch",
        "torchvision",
        "segmentation-models-pytorch",
        "timm",
        "accelerate",
        "jupyterlab",
        "papermill",
    ):
        try:
            typer.echo(f"  {name} {version(name)}")
        except PackageNotFoundError:
            typer.echo(f"  {name} MISSING: run `make environment`")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    typer.echo(f"devices: {', '.join(devices) or 'no GPU'}; CPU with {torch.get_num_threads()} threads")
    typer.echo(
        f"data root: {root.resolve()}" + ("" if root.is_dir() else " (does not exist; the embedded scenes need none)")
    )
    for name in (*data.DATASETS, *data.CLASSIFICATION):
        there = "train" in data.splits(name, root)
        typer.echo(f"  {name}: " + ("found" if there else f"absent, fetch it with `python -m data_prep {name}`"))
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    typer.echo(f"free disk here: {free:.1f} GiB" + (" (a quick run needs about 1 GiB)" if free < 1 else ""))


def main() -> None:
    """Run the command line: errors a user can mend are one sentence and exit code 2, `--debug` shows where."""
    debug = "--debug" in sys.argv[1:]  # anywhere on the line
    try:
        app(args=[word for word in sys.argv[1:] if word != "--debug"])
    except UserError as error:
        if debug:
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except SystemExit as end:
        if end.code == 130:  # typer's exit code after Ctrl-C
            typer.echo("interrupted; what was finished is kept, run the same command to continue", err=True)
        raise


if __name__ == "__main__":
    main()
