"""Every figure of the collection as a function of a table, in one style; `save_figure` writes it.

Shares and scores are fractions in every table; the axes show percent, and percentage points for differences.
Each `plot_*` draws on the axes given, else on new ones, and returns them.
"""

from ltseg_core.viz.comparisons import (
    plot_against_frequency,
    plot_by_group,
    plot_correlations,
    plot_costs,
    plot_delta_map,
    plot_deltas,
    plot_differences,
    plot_history,
    plot_means,
    plot_per_class,
    plot_sweep,
)
from ltseg_core.viz.look import (
    DPI,
    ERROR_COLOURS,
    FREQUENCY_STYLES,
    GROUP_COLOURS,
    GROUP_MARKERS,
    HOLLOW,
    KIND_LABELS,
    METHOD_LABELS,
    METRIC_LABELS,
    WIDTH,
    MethodStyle,
    method_colour,
    method_style,
    style,
    subplots,
)
from ltseg_core.viz.pictures import (
    colourise,
    error_colours,
    plot_errors,
    plot_label_legend,
    plot_predictions,
    plot_samples,
)
from ltseg_core.viz.saving import save_figure, save_table, saved_tables
from ltseg_core.viz.statistics import plot_class_shares, plot_image_imbalance, plot_imbalance, plot_mask_sizes

__all__ = [
    "DPI",
    "ERROR_COLOURS",
    "FREQUENCY_STYLES",
    "GROUP_COLOURS",
    "GROUP_MARKERS",
    "HOLLOW",
    "KIND_LABELS",
    "METHOD_LABELS",
    "METRIC_LABELS",
    "WIDTH",
    "MethodStyle",
    "colourise",
    "error_colours",
    "method_colour",
    "method_style",
    "plot_against_frequency",
    "plot_by_group",
    "plot_class_shares",
    "plot_correlations",
    "plot_costs",
    "plot_delta_map",
    "plot_deltas",
    "plot_differences",
    "plot_errors",
    "plot_history",
    "plot_image_imbalance",
    "plot_imbalance",
    "plot_label_legend",
    "plot_mask_sizes",
    "plot_means",
    "plot_per_class",
    "plot_predictions",
    "plot_samples",
    "plot_sweep",
    "save_figure",
    "save_table",
    "saved_tables",
    "style",
    "subplots",
]
