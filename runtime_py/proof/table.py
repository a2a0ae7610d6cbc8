"""The checks of a proof as a table."""

from collections.abc import Sequence

from export.checks import Check
from runtime_py.proof.limits import AT_LEAST
from runtime_py.report import table

METRICS = (
    *("equal", "soft_rms", "max_abs", "mean_abs", "relative_rms"),
    *("kl_mean", "kl_median", "kl_max", "kl_worst_position", "float_equal", "top1_agreement", "decibels"),
)


def validation_table(checks: Sequence[Check]) -> str:
    """A table with one row per check id and its figures side by side, and the limits of each artifact's checks below.

    A figure that did not pass is marked FAILED. Landmarks all have the same limits, which stand there once.
    """
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    limits: dict[str, dict[str, dict[str, str]]] = {}
    for check in checks:
        shown = f"{check.value:.3g}" + ("" if check.passed else " FAILED")
        rows.setdefault((check.artifact, check.id, check.name), {})[check.metric] = shown
        if check.limit is not None:
            sign = "≥" if check.metric in AT_LEAST else "≤"
            id = "landmark/…" if check.id.startswith("landmark/") else check.id
            of_check = limits.setdefault(check.artifact, {}).setdefault(id, {})
            of_check[check.metric] = f"{check.metric} {sign} {check.limit:.3g}"
    metrics = sorted({check.metric for check in checks}, key=METRICS.index)
    figures = table(
        ("artifact", "check", *metrics),
        [
            (artifact, name, *(values.get(metric, "") for metric in metrics))
            for (artifact, _, name), values in rows.items()
        ],
        left=2,
    )
    notes = [
        f"limits of {artifact}, {id}: {', '.join(kept.values())}"
        for artifact, of_artifact in limits.items()
        for id, kept in of_artifact.items()
    ]
    return "\n".join((figures, "", *notes))
