"""``tta-server check``: what the models of a config are, and which policies can run on them."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tta_server.drift.benefit import GROUP as BENEFIT
from tta_server.drift.benefit import UNPREPARED
from tta_server.drift.reference import GROUP as MONITORING
from tta_server.engine.report import check_defaults
from tta_server.engine.source import SourceModel
from tta_server.settings import GuardSettings
from tta_server.state.memory import Budget


def print_report(models: Mapping[str, SourceModel], budget: Budget, guard: GuardSettings, console: Console) -> None:
    """Prints each model's findings and its table of policies, with how many streams of each would fit on the device if
    there were no others. Raises ``ConfigError`` for a default that cannot run."""
    console.print(
        f"memory for stream states: {_size(budget.device_bytes)} on the device, {_size(budget.host_bytes)} of the host "
        "(limits.device_bytes, limits.host_bytes); the rest is on the disk",
        highlight=False,
    )
    for model in models.values():
        layers = ", ".join(f"{count} {kind}" for kind, count in model.norm_layers.items()) or "none"
        console.print(f"[bold]{model.name}[/bold]: {model.architecture}, {model.parameters:,} parameters")
        console.print(f"  digest         {model.digest[:16]}...")
        console.print(f"  device         {model.network.device}")
        console.print(f"  input          {list(model.settings.input.shape)} in {model.settings.input.range}")
        console.print(f"  classes        {len(model.classes)}")
        console.print(f"  head           {model.source.head}, of {model.source.feature_dim} features")
        console.print(f"  norm layers    {layers}")
        same = "bit for bit" if model.row_gap == 0 else f"within {model.row_gap:.1e}"
        console.print(f"  isolation      a row scores the same alone and in a batch, {same}")
        console.print(f"  adaptable      {len(model.source.affine)} tensors, {model.adaptable_values:,} values")
        console.print(f"  artefacts      {', '.join(model.prepared) or 'none; tta-server prepare makes them'}")
        if model.reference is None:
            console.print(
                "  [yellow]monitoring[/yellow]     nothing to compare streams with: no drift score, no verdict; "
                f"tta-server prepare CONFIG --data CLEAN_IMAGES --only {MONITORING}"
            )
        else:
            how = model.prepared[MONITORING]
            console.print(f"  monitoring     compares with {how['images']} clean images of {how['data']}")
        if not guard.enabled:
            console.print("  guard          off (guard.enabled): adapted answers are served, whatever comes of it")
        elif model.judge is UNPREPARED:
            console.print(
                "  [yellow]guard[/yellow]          by a rule of thumb that is not fitted to this model; "
                f"tta-server prepare CONFIG --data CLEAN_LABELLED_IMAGES --only {BENEFIT}"
            )
        else:
            console.print(f"  guard          fitted to this model; guarantee: {guard.guarantee.kind}")
        for name in model.left_alone:
            found = f"{name}: of a type that streams cannot adapt yet; stays as trained"
            console.print(f"  [yellow]left alone[/yellow]     {found}")
        cards = {name: report["card"] for name, report in model.reports.items() if "card" in report}
        table = Table("policy", "runs", "bytes per stream", "slots", *(["report card"] if cards else []), "why not")
        for report in model.reports.values():
            size = report["bytes_per_stream"] if report["runs"] else 0
            table.add_row(
                report["name"],
                "yes" if report["runs"] else "no",
                f"{size:,}" if report["runs"] else "",
                f"{budget.fit(size):,}" if size else "",
                *([cards[report["name"]]["verdict"] if report["name"] in cards else ""] if cards else []),
                Text(report.get("reason", "")),
            )
        console.print(table)
        if not cards:
            console.print("  report card    none; tta-server prepare CONFIG --data CLEAN_IMAGES --report makes one")
        for name, card in cards.items():
            console.print(Text(f"  {name}: {card['verdict']}. {card['sentence']}"))
    check_defaults(models)


def _size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
