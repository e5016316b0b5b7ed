"""The ``tta-server`` command."""

from __future__ import annotations

import hashlib
import os
import secrets
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

import adapters
from tta_server import __version__, app, check, logs, report_card, state_cli
from tta_server.engine.allocator import keep_memory
from tta_server.errors import BadInput, ConfigError, TtaError
from tta_server.policies import check_package_names, describe, load_plugins
from tta_server.settings import Settings, load_settings

cli = typer.Typer(
    help="Serves vision models that adapt to each client's stream at test time.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
cli.add_typer(state_cli.commands, name="state")


@cli.callback()
def _prepare() -> None:
    keep_memory()


Config = Annotated[Path, typer.Argument(help="The config file (YAML).", metavar="CONFIG")]


@cli.command()
def serve(
    config: Config,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = None,
    state: Annotated[Path | None, typer.Option(help="Folder of the stored streams, instead of the config's.")] = None,
    take_over: Annotated[
        bool, typer.Option("--take-over", help="Take the streams from a server that runs; it can save no more.")
    ] = False,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Serve others without asking for tokens; something else keeps order.")
    ] = False,
) -> None:
    """Starts the server."""
    settings = _settings(config, host, port)
    if state is not None:
        settings = settings.model_copy(
            update={"state": settings.state.model_copy(update={"folder": str(state.absolute())})}
        )
    logs.configure(settings.log.format, settings.log.level)
    app.check_exposure(settings, insecure)
    application = app.create_app(settings, app.load_models(settings))
    app.serve(application, settings, take_over)


@cli.command("check")
def check_config(config: Config) -> None:
    """Loads the models of a config and says what was found; exits 1 when something is wrong."""
    settings = _settings(config)
    models = app.load_models(settings)
    check.print_report(models, app.measure_memory(settings, models), settings.guard, Console())


@cli.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the plot, the example request and the server's log.")] = Path(
        "demo-out"
    ),
    batches: Annotated[int, typer.Option(help="Batches that every stream sends.")] = 60,
    batch_size: Annotated[int, typer.Option(help="Digits in a batch.")] = 32,
    interval: Annotated[float, typer.Option(help="Seconds between two batches of a stream; 0: no pause.")] = 0.4,
    seed: Annotated[int, typer.Option(help="Of the digits' order and of random corruptions.")] = 0,
    url: Annotated[
        str | None,
        typer.Option(help="Only the streams, over and over, to this server of the demo's model; TTA_TOKEN: its token."),
    ] = None,
) -> None:
    """Starts a server and seven drifting client streams, and shows what adaptation does for each."""
    try:
        from tta_server.demo.run import DemoOptions, run_clients, run_demo
    except ImportError as error:
        raise ConfigError(f"{error}; the demo needs more packages: pip install 'tta-server[demo]'") from error
    options = DemoOptions(out, batches, batch_size, interval, seed)
    if url is not None:
        run_clients(options, url, os.environ.get("TTA_TOKEN", ""), Console())
    run_demo(options, Console())


@cli.command()
def evaluate(
    config: Config,
    data: Annotated[Path, typer.Option(help="Folder of domains: .npz files, or CIFAR-10-C's .npy files.")],
    out: Annotated[Path, typer.Option(help="Folder for results.json and errors.png.")],
    policies: Annotated[str, typer.Option(help="Policies to run, separated by commas.")] = "source,norm,tent",
    batch_size: Annotated[int, typer.Option(min=1, help="Images in a batch.")] = 200,
    order: Annotated[str, typer.Option(help="domains, shuffled, sorted or dirichlet:X.")] = "domains",
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first so many images of each domain.")] = None,
    domains: Annotated[str, typer.Option(help="Domains in their order, separated by commas; default: all.")] = "",
    seed: Annotated[int, typer.Option(help="Of the order and of the policies' random numbers.")] = 0,
    severity: Annotated[int, typer.Option(min=1, max=5, help="Of CIFAR-10-C's .npy files.")] = 5,
    model: Annotated[str | None, typer.Option(help="Which model, where the config has several.")] = None,
    save_logits: Annotated[bool, typer.Option(help="Save the served scores of each policy.")] = False,
    passes: Annotated[int, typer.Option(min=1, help="How often to go through all domains, without a reset.")] = 1,
    set: Annotated[
        list[str] | None,
        typer.Option(help="A setting over the config's: policy.setting=value, or setting=value for all. Repeatable."),
    ] = None,
) -> None:
    """Runs policies over a folder of corrupted images, through the server's engine, and compares their errors."""
    from tta_server.evaluate import EvaluateOptions, evaluate

    check_package_names()
    options = EvaluateOptions(
        config,
        data,
        _names(policies),
        batch_size,
        order,
        out,
        limit,
        _names(domains),
        seed,
        severity,
        model,
        save_logits=save_logits,
        passes=passes,
        overrides=tuple(set or ()),
    )
    evaluate(options, Console())


@cli.command()
def prepare(
    config: Config,
    data: Annotated[Path, typer.Option(help="Clean source images: an .npz file, or a folder (see docs/policies.md).")],
    only: Annotated[
        str, typer.Option(help="Groups to make, separated by commas; default: all but warmup_norm, replay.")
    ] = "",
    model: Annotated[str | None, typer.Option(help="Which model, where the config has several.")] = None,
    batch_size: Annotated[int, typer.Option(min=2, help="Images in a batch.")] = 64,
    images: Annotated[int, typer.Option(min=2, help="Most images used of the data, drawn at random.")] = 5000,
    fisher_images: Annotated[int, typer.Option(min=2, help="Images for the Fisher information.")] = 2000,
    calibration_images: Annotated[int, typer.Option(min=2, help="Images for the calibration scores.")] = 2000,
    monitoring_images: Annotated[int, typer.Option(min=4, help="Images that the monitor's tables are made of.")] = 2000,
    replay_images: Annotated[int, typer.Option(min=2, help="Images stored for rmt's source replay.")] = 2000,
    warm_up_images: Annotated[int, typer.Option(min=2, help="Images that rmt's warm-up goes through in all.")] = 50_000,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice and order of images.")] = 0,
    force: Annotated[bool, typer.Option(help="Make anew what is there already.")] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Make a report card of policies, too: tried against the source.")
    ] = False,
    report_images: Annotated[
        int, typer.Option(min=report_card.LEAST_IMAGES, help="Most images in a scenario of the report card.")
    ] = 384,
    reported: Annotated[
        list[str] | None,
        typer.Argument(metavar="POLICY", help="With --report: which; default: all that run on the model."),
    ] = None,
) -> None:
    """Computes what some policies need to know of the source data, once, and stores it beside the weights."""
    from tta_server.prepare import PrepareOptions, prepare

    if reported and not report:
        raise BadInput(f"policies are named for --report only, got {' '.join(reported)}")
    check_package_names()
    options = PrepareOptions(
        config=config,
        data=data,
        only=_names(only),
        model=model,
        batch_size=batch_size,
        images=images,
        fisher_images=fisher_images,
        calibration_images=calibration_images,
        monitoring_images=monitoring_images,
        replay_images=replay_images,
        warm_up_images=warm_up_images,
        seed=seed,
        force=force,
        report=tuple(reported or ()) if report else None,
        report_images=report_images,
    )
    prepare(options, Console())


@cli.command()
def policies() -> None:
    """Lists the policies and their settings."""
    load_plugins()
    table = Table("policy", "adapts", "needs", "settings (defaults)", "what it does", title="Policies")
    for name in adapters.policies():
        about = describe(name)
        settings = ", ".join(f"{key}={one.get('default')}" for key, one in about["settings"]["properties"].items())
        table.add_row(name, about["scope"], ", ".join(about["needs"]) or "-", settings or "-", about["summary"])
    Console().print(table)


@cli.command()
def token() -> None:
    """Makes a bearer token: for the client, and its SHA-256 for auth.tokens or the tokens file."""
    made = secrets.token_urlsafe(32)
    typer.echo(f"token:  {made}")
    typer.echo(f"sha256: {hashlib.sha256(made.encode()).hexdigest()}")


@cli.command()
def version() -> None:
    """Prints the version."""
    typer.echo(__version__)


def _names(listed: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in listed.split(",") if name.strip())


def _settings(config: Path, host: str | None = None, port: int | None = None) -> Settings:
    check_package_names()
    load_plugins()
    settings = load_settings(config)
    changes = {key: value for key, value in (("host", host), ("port", port)) if value is not None}
    return settings.model_copy(update={"server": settings.server.model_copy(update=changes)})


def main() -> None:
    """Entry point: runs a command; an error of ours is one line and exit status 1."""
    try:
        cli()
    except TtaError as error:
        Console(stderr=True).print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)
        sys.exit(1)
