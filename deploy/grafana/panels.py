"""How the dashboards look: panels, queries and variables with this project's choices made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias, TypeVar

from grafana_foundation_sdk.builders import common as share
from grafana_foundation_sdk.builders import dashboard as make
from grafana_foundation_sdk.builders import heatmap as heat
from grafana_foundation_sdk.builders import prometheus, stat, statetimeline, table, text, timeseries
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import common as look
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode, HeatmapColorScale
from grafana_foundation_sdk.models.prometheus import PromQueryFormat
from grafana_foundation_sdk.models.text import TextMode

Panel: TypeAlias = Builder[model.Panel]
Query: TypeAlias = prometheus.Dataquery
Variable: TypeAlias = Builder[model.VariableModel]
Made = TypeVar("Made", timeseries.Panel, stat.Panel, heat.Panel, table.Panel, statetimeline.Panel)

SOURCE = model.DataSourceRef(type_val="prometheus", uid="${datasource}")
BLUE, GREEN, YELLOW, ORANGE, RED, PURPLE, GREY = "blue", "green", "yellow", "orange", "red", "purple", "#808080"
MODE_FIXED, MODE_STEPS = model.FieldColorModeId.FIXED, model.FieldColorModeId.THRESHOLDS
WIDTH = 24


def query(expression: str, legend: str = "") -> Query:
    """A query over the dashboard's time range. ``legend`` with ``{{label}}``; without one, the series is not named."""
    return prometheus.Dataquery().expr(expression).legend_format(legend or "__auto").range().datasource(SOURCE)


def now(expression: str, name: str) -> Query:
    """A query at the range's end, as a column of a table."""
    made = prometheus.Dataquery().expr(expression).instant().format(PromQueryFormat.TABLE)
    return made.ref_id(name).datasource(SOURCE)


def graph(
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    span: int = 8,
    top: float | None = None,
    bottom: float | None = 0,
    stacked: bool = False,
    bars: bool = False,
    log: bool = False,
    line: float | None = None,
    colors: dict[str, str] | None = None,
) -> timeseries.Panel:
    """Lines over time; ``stacked`` areas or ``bars``. ``line``: a dashed one there. ``colors``: by name."""
    panel = _with(timeseries.Panel(), title, description, queries, span, 8)
    panel = panel.unit(unit).line_width(1).show_points(look.VisibilityMode.NEVER).fill_opacity(70 if bars else 10)
    panel = panel.legend(
        share.VizLegendOptions()
        .show_legend(True)
        .display_mode(look.LegendDisplayMode.LIST)
        .placement(look.LegendPlacement.BOTTOM)
    )
    panel = panel.tooltip(share.VizTooltipOptions().mode(look.TooltipDisplayMode.MULTI).sort(look.SortOrder.DESCENDING))
    if bottom is not None:
        panel = panel.min(bottom)
    if top is not None:
        panel = panel.max(top)
    if stacked:
        panel = panel.stacking(share.StackingConfig().mode(look.StackingMode.NORMAL).group("A")).fill_opacity(60)
    if bars:
        panel = panel.draw_style(look.GraphDrawStyle.BARS)
    if log:
        logarithmic = share.ScaleDistributionConfig().type(look.ScaleDistribution.LOG).log(10)
        panel = panel.scale_distribution(logarithmic)
    if line is not None:
        dashed = share.GraphThresholdsStyleConfig().mode(look.GraphThresholdsStyleMode.DASHED)
        panel = panel.thresholds(_steps("transparent", (line, ORANGE))).thresholds_style(dashed)
    for name, color in (colors or {}).items():
        panel = panel.override_by_name(name, [_fixed(color)])
    return panel


def number(
    title: str,
    description: str,
    unit: str,
    expression: str,
    *steps: tuple[float, str],
    legend: str = "",
    first: str = GREEN,
    words: dict[str, tuple[str, str]] | None = None,
    none: str = "no data",
    span: int = 3,
    height: int = 4,
) -> stat.Panel:
    """The last value, large, with a sparkline, coloured by ``steps``. ``words``: text and colour by value, instead."""
    panel = _with(stat.Panel(), title, description, [query(expression, legend)], span, height).unit(unit).no_value(none)
    panel = panel.reduce_options(share.ReduceDataOptions().calcs(["lastNotNull"]))
    panel = panel.graph_mode(look.BigValueGraphMode.NONE if words else look.BigValueGraphMode.AREA)
    panel = panel.color_mode(look.BigValueColorMode.VALUE).color_scheme(make.FieldColor().mode(MODE_STEPS))
    return panel.thresholds(_steps(first, *steps)).mappings(_words(words or {}))


def heatmap(title: str, description: str, expression: str, unit: str = "short", span: int = 8) -> heat.Panel:
    """Of cumulative buckets by ``le``: how many lie in each, over time."""
    buckets = query(expression, "{{le}}").format(PromQueryFormat.HEATMAP)
    panel = _with(heat.Panel(), title, description, [buckets], span, 8)
    color = heat.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Blues").steps(64)
    panel = panel.color(color.scale(HeatmapColorScale.EXPONENTIAL).exponent(0.5).reverse(False))
    panel = panel.y_axis(heat.YAxisConfig().unit("short")).cell_values(heat.CellValues().unit(unit)).unit(unit)
    return panel.cell_gap(0).calculate(False).show_color_scale(True).show_legend()


def timeline(title: str, description: str, expression: str, legend: str, words: dict[str, tuple[str, str]]) -> Panel:
    """States over time, a row for each series. ``words``: text and colour by value."""
    panel = _with(statetimeline.Panel(), title, description, [query(expression, legend)], WIDTH, 5).unit("none")
    return panel.mappings(_words(words)).show_value(look.VisibilityMode.AUTO).merge_values(True).row_height(0.8)


def rows(
    title: str,
    description: str,
    columns: dict[str, str],
    *queries: Query,
    units: dict[str, str] | None = None,
    words: dict[str, dict[str, tuple[str, str]]] | None = None,
    link: tuple[str, str] | None = None,
    sort: str | None = None,
    span: int = WIDTH,
    none: str = "none",
) -> table.Panel:
    """A table of queries made by :func:`now`, joined by their common labels.

    ``columns``: the labels and values that are shown, in order, each with the name to show it by; the other arguments
    use these names. ``link``: a column and where its values lead. ``sort``: the column to sort by, largest first.
    """
    panel = _with(table.Panel(), title, description, queries, span, 8).unit("short").no_value(none).show_header(True)
    panel = panel.with_transformation(model.DataTransformerConfig(id_val="merge", options={}))
    kept: dict[str, object] = {"include": {"names": list(columns)}}
    panel = panel.with_transformation(model.DataTransformerConfig(id_val="filterFieldsByName", options=kept))
    order = {name: place for place, name in enumerate(columns)}
    renamed: dict[str, object] = {"excludeByName": {}, "indexByName": order, "renameByName": columns}
    panel = panel.with_transformation(model.DataTransformerConfig(id_val="organize", options=renamed))
    for column, unit in (units or {}).items():
        decimals = model.DynamicConfigValue(id_val="decimals", value=2)
        panel = panel.override_by_name(column, [model.DynamicConfigValue(id_val="unit", value=unit), decimals])
    for column, meaning in (words or {}).items():
        colored = model.DynamicConfigValue(id_val="custom.cellOptions", value={"type": "color-text"})
        mapped = model.DynamicConfigValue(id_val="mappings", value=_words(meaning))
        panel = panel.override_by_name(column, [mapped, colored])
    if link is not None:
        target = model.DynamicConfigValue(id_val="links", value=[{"title": "Show", "url": link[1]}])
        panel = panel.override_by_name(link[0], [target])
    if sort is not None:
        panel = panel.sort_by([share.TableSortByFieldState().display_name(sort).desc(True)])
    return panel


def note(title: str, content: str, span: int = WIDTH, height: int = 4) -> Panel:
    """Text, in Markdown."""
    return text.Panel().title(title).mode(TextMode.MARKDOWN).content(content).span(span).height(height)


def board(
    uid: str,
    title: str,
    description: str,
    variables: Sequence[Variable],
    annotations: Sequence[make.AnnotationQuery],
    content: dict[str, Sequence[Panel]],
) -> model.Dashboard:
    """A dashboard: a row of panels for each title in ``content``."""
    built = make.Dashboard(title).uid(uid).description(description).tags(["tta-server"]).readonly()
    built = built.time("now-1h", "now").refresh("30s").tooltip(model.DashboardCursorSync.CROSSHAIR).timezone("browser")
    others = make.DashboardLink("tta-server").type(model.DashboardLinkType.DASHBOARDS).tags(["tta-server"])
    built = built.link(others.keep_time(True).include_vars(True))
    source = make.DatasourceVariable("datasource").label("Data Source").type("prometheus")
    built = built.variables([source, *variables])
    for annotation in annotations:
        built = built.annotation(annotation)
    for row, panels in content.items():
        built = built.with_row(make.Row(row))
        for panel in panels:
            built = built.with_panel(panel)
    made = built.build()
    for place, one in enumerate(made.panels or (), start=1):
        one.id_val = place  # Links to a panel are by its number.
    return made


def variable(
    name: str,
    label: str,
    query: str,
    many: bool = True,
    everything: str | None = ".+",
    description: str = "",
) -> make.QueryVariable:
    """The values of a label, to choose one or ``many`` from, or all by the pattern ``everything``."""
    made = make.QueryVariable(name).label(label).query(query).description(description).multi(many)
    made = made.datasource(model.DataSourceRef(type_val="prometheus", uid="$datasource"))
    made = made.refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED).sort(model.VariableSort.ALPHABETICAL_ASC)
    if everything is None:
        return made.include_all(False)
    return made.include_all(True).all_value(everything).current(model.VariableOption(text="All", value="$__all"))


def annotation(name: str, expression: str, color: str) -> make.AnnotationQuery:
    """Marks in all graphs where the expression has a value."""
    return make.AnnotationQuery().name(name).expr(expression).icon_color(color).datasource(SOURCE)


def _with(panel: Made, title: str, description: str, queries: Sequence[Query], span: int, height: int) -> Made:
    """What all panels have. Queries without a name of their own are A, B, ..."""
    panel = panel.title(title).description(description).datasource(SOURCE).span(span).height(height)
    for place, one in enumerate(queries):
        panel = panel.with_target(one if one.build().ref_id else one.ref_id(chr(ord("A") + place)))
    return panel


def _fixed(color: str) -> model.DynamicConfigValue:
    return model.DynamicConfigValue(id_val="color", value={"mode": MODE_FIXED, "fixedColor": color})


def _steps(first: str, *steps: tuple[float, str]) -> make.ThresholdsConfig:
    """Colours: the first from below, each other from its value on."""
    found = [model.Threshold(None, first), *(model.Threshold(value, color) for value, color in steps)]
    return make.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(found)


def _words(words: dict[str, tuple[str, str]]) -> list[model.ValueMapping]:
    """Text and colour by value."""
    results = {
        value: model.ValueMappingResult(text=text, color=color, index=place)
        for place, (value, (text, color)) in enumerate(words.items())
    }
    return [model.ValueMap(options=results)] if words else []
