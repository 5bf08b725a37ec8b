"""Old name of `style.markdown` and `style.latex`, for rows of cells."""

import pandas as pd

from bridgekit.results.style import latex, markdown


def format_rows(head, body, style="markdown", strong=None):
    table = pd.DataFrame(body, columns=head)
    return latex(table, strong) if style == "latex" else markdown(table, strong)
