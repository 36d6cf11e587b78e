"""The charts of TensorBoard's page "Custom Scalars"."""

from __future__ import annotations

from typing import Any

__all__ = ["layout"]

# For each chart, its title and a regular expression for its tags.
OVERVIEW = {
    "fraction of exact zeros": r"sparsity/total",
    "flipped since the last log": r"flipped/total",
    "l1 norm": r"norm/l1",
    "l2 norm": r"norm/l2",
}
PENALTY = {"lambda": r"penalty/lam.*", "penalty": r"penalty/value", "penalty / loss": r"penalty/ratio"}
PARAMETERS = {
    "fraction of exact zeros": r"sparsity/(?!total$).*",
    "flipped since the last log": r"flipped/(?!total$).*",
    "dead groups": r"dead_groups/.*",
    "multiplier of lambda in the prox": r"multiplier/.*",
}


def layout(has_weights: bool, has_penalty: bool) -> dict[str, dict[str, list[Any]]]:
    """The charts by category and title, as `SummaryWriter.add_custom_scalars` takes them."""
    categories = {
        "torch_regpen": {**(OVERVIEW if has_weights else {}), **(PENALTY if has_penalty else {})},
        "torch_regpen: each parameter": PARAMETERS if has_weights else {},
    }
    return {
        category: {title: ["Multiline", [tags]] for title, tags in charts.items()}
        for category, charts in categories.items()
        if charts
    }
