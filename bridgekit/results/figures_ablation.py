"""Old name of `tables.tabulate_variants`, as text."""

from bridgekit.results.style import latex, markdown
from bridgekit.results.tables import tabulate_variants


def ablation_table(frame, style="markdown"):
    return latex(tabulate_variants(frame)) if style == "latex" else markdown(tabulate_variants(frame))
