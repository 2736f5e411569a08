from matplotlib.figure import Figure

from replica_newton.report.style import figure_svg, settle


def drawn(layout: str | None) -> Figure:
    """Panels of different widths, whose labels need room."""
    figure = Figure(layout=layout)
    for axes in figure.subplots(1, 3, width_ratios=[1, 2, 5]):
        axes.plot([0, 1], [0, 1000])
        axes.set_xlabel("a label\nof two lines", rotation=40)
    return figure


def positions(figure: Figure) -> list[tuple[float, ...]]:
    return [axes.get_position().bounds for axes in figure.axes]


def test_a_settled_figure_stays_where_it_is() -> None:
    figure = drawn("constrained")
    before = positions(figure)
    settle(figure)
    settled = positions(figure)
    assert settled != before
    figure.draw_without_rendering()
    settle(figure)
    assert positions(figure) == settled
    corners = [value for axes in figure.axes for value in axes.get_position().extents]
    assert corners == [round(value, 6) for value in corners]


def test_a_figure_that_lays_itself_out_is_left_alone() -> None:
    figure = drawn(None)
    before = positions(figure)
    settle(figure)
    assert positions(figure) == before


def test_an_svg_does_not_depend_on_what_was_drawn_before() -> None:
    first, second = drawn("constrained"), drawn("constrained")
    for _ in range(2):
        second.draw_without_rendering()
    assert figure_svg(first) == figure_svg(second)
    assert figure_svg(first) == figure_svg(first)
