"""Pages in Markdown: a template of a package, and the filters that all of them need."""

from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from replica_newton.report.formats import format_count, format_nll


def render_markdown(package: str, template: str, filters: Mapping[str, Callable[..., Any]], **values: Any) -> str:
    """A page without trailing blanks.

    Args:
        package: that holds the template, such as "replica_newton.benchmark".
        template: name of its file.
        filters: that it uses beside `nll`, where None has diverged, and `count`.
        values: that it shows.

    Returns:
        The page.
    """
    # No HTML: the page is Markdown, and all of its values are our own.
    environment = Environment(  # noqa: S701
        loader=PackageLoader(package, ""), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    common: dict[str, Callable[..., Any]] = {
        "nll": lambda value: "diverged" if value is None else format_nll(value),
        "count": format_count,
    }
    environment.filters |= common | dict(filters)
    page = environment.get_template(template).render(**values)
    return "".join(f"{line.rstrip()}\n" for line in page.splitlines())
