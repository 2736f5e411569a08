import io

from rich.console import Console

from replica_newton.report.tables import results_table


def render(summary, width=80):
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(results_table(summary))
    return console.file.getvalue().splitlines()


def test_fits_into_80_columns(make_run, make_summary):
    runs = [
        make_run("saddle-free", 128, seed=seed, rate=rate, nll=[0.9, 0.00012345 + 0.0001 * seed], work=555_500)
        for seed in range(3)
        for rate in (0.001234, 0.0005)
    ]
    runs.append(make_run("a method with a long name", 8, nll=[None]))
    wide, narrow = render(make_summary(*runs), width=200), render(make_summary(*runs))
    # The rows are the same as with room to spare: nothing was cut off to make the table fit.
    assert [line.rstrip() for line in wide] == [line.rstrip() for line in narrow]
    assert max(map(len, narrow)) <= 80
    assert any("0.000123–0.000323" in line for line in narrow)


def test_row(make_run, make_summary):
    runs = [make_run("paper", 4, seed=s, nll=[0.9, end], work=60_000) for s, end in enumerate((0.5, 0.2, 0.3))]
    row = next(line for line in render(make_summary(*runs)) if "paper" in line)
    assert row.split() == ["paper", "4", "0.1", "0.300", "0.200–0.500", "92.0", "%", "120k", "5.0", "3"]


def test_star_marks_the_best_of_several_rates(make_run, make_summary):
    runs = [make_run("sgd", 1, rate=rate, nll=[0.9, rate]) for rate in (0.2, 0.1)]
    text = "\n".join(render(make_summary(*runs, make_run("adam", 1, nll=[0.9, 0.8]))))
    assert "*0.1 " in text
    assert text.count("*") == 2  # the mark and its explanation


def test_lowest_row_is_bold(make_run, make_summary):
    table = results_table(make_summary(make_run("sgd", 1, nll=[0.9, 0.4]), make_run("adam", 1, nll=[0.9, 0.3])))
    assert [row.style for row in table.rows] == [None, "bold"]


def test_method_name_is_not_markup(make_run, make_summary):
    assert any("[red]mine" in line for line in render(make_summary(make_run("[red]mine", 1, nll=[0.9]))))
