"""The ``tta-server`` command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
import uvicorn
from rich.console import Console
from rich.table import Table
from rich.text import Text

import adapters
from tta_server import __version__, app, check, logs
from tta_server.errors import TtaError
from tta_server.policies import check_package_names, describe, load_plugins
from tta_server.settings import Settings, load_settings

cli = typer.Typer(
    help="Serves vision models that adapt to each client's stream at test time.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Config = Annotated[Path, typer.Argument(help="The config file (YAML).", metavar="CONFIG")]


@cli.command()
def serve(
    config: Config,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one.")] = None,
) -> None:
    """Starts the server."""
    logs.configure()
    settings = _settings(config, host, port)
    application = app.create_app(settings, app.load_models(settings))
    uvicorn.run(
        application,
        host=settings.server.host,
        port=settings.server.port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=int(settings.limits.drain_seconds) + 1,
    )


@cli.command("check")
def check_config(config: Config) -> None:
    """Loads the models of a config and says what was found; exits 1 when something is wrong."""
    check.print_report(app.load_models(_settings(config)), Console())


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
def version() -> None:
    """Prints the version."""
    typer.echo(__version__)


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
        Console(stderr=True).print(Text.assemble(("error: ", "bold red"), str(error)))
        sys.exit(1)
