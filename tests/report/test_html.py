from html.parser import HTMLParser

import pytest

from replica_newton.report.html import write_report
from replica_newton.report.summary import headline

VOID = {"meta", "br", "link", "img", "hr", "input"}


class Page(HTMLParser):
    """Elements, tables and texts of a page; elements must be closed in the right order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):  # noqa: D102
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in {"td", "th"}:
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):  # noqa: D102
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):  # noqa: D102
        assert self._open.pop() == tag

    def handle_data(self, data):  # noqa: D102
        self.texts.append(data)
        if "td" in self._open or "th" in self._open:
            self.rows[-1][-1] += data.strip() + " "


@pytest.fixture
def write(tmp_path):
    """Report of a summary, as text."""

    def write_text(summary, **environment):
        return write_report(summary, tmp_path, environment).read_text(encoding="utf-8")

    return write_text


def cells(page, first):
    return [[cell.strip() for cell in row] for row in page.rows if row and row[0].split()[:1] == [first]]


def test_writes_only_the_report(ladder, tmp_path):
    assert write_report(ladder, tmp_path / "new", {}) == tmp_path / "new" / "report.html"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.html"]


def test_needs_nothing_else(ladder, write):
    text = write(ladder)
    page = Page(text)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "img", "object", "embed", "image"}
    references = [value for _, a in page.elements for key, value in a.items() if key in {"src", "href", "xlink:href"}]
    assert [value for value in references if not value.startswith("#")] == ["https://arxiv.org/abs/1709.05069"]
    assert "@import" not in text
    # Clip paths inside the figure are the only addresses in styles.
    assert text.count("url(") == text.count("url(#") > 0
    assert "svg" in tags


def test_states_headline_settings_environment_and_source(ladder, write):
    page = Page(write(ladder, torch="2.13.0", command_line="replica-newton compare --epochs 2"))
    assert headline(ladder) in page.texts
    assert ["batch size", "8"] in cells(page, "batch")
    assert ["parameters", "1,234"] in cells(page, "parameters")
    assert ["torch", "2.13.0"] in cells(page, "torch")
    assert ["command line", "replica-newton compare --epochs 2"] in cells(page, "command")
    assert "arXiv:1709.05069" in page.texts


def test_results_row(make_run, make_summary, write):
    ends = (0.5, 0.2, 0.3)
    runs = [make_run("paper", 4, seed=s, nll=[0.9, end], work=60_000) for s, end in enumerate(ends)]
    page = Page(write(make_summary(*runs)))
    assert cells(page, "paper")[0] == [
        "paper lowest", "4", "0.1", "2", "0.300", "0.200–0.500", "92.0 %", "120k", "5.0", "3",
    ]  # fmt: skip


def test_marks_best_rate_and_lowest_row(make_run, make_summary, write):
    ends = {("sgd", 0.1): 0.4, ("sgd", 0.2): 0.3, ("adam", 0.1): 0.2}
    page = Page(write(make_summary(*(make_run(m, 1, rate=rate, nll=[0.9, end]) for (m, rate), end in ends.items()))))
    assert [row[2] for row in cells(page, "SGD")] == ["0.1", "best rate 0.2"]
    assert [row[:3] for row in cells(page, "Adam")] == [["Adam lowest", "1", "0.1"]]
    assert [
        attributes["class"].strip() for tag, attributes in page.elements if "lowest" in (attributes.get("class") or "")
    ] == ["lowest new"]


def test_every_epoch_is_in_a_collapsed_table(make_run, make_summary, write):
    page = Page(write(make_summary(make_run("sgd", 1, nll=[0.9, 0.4]), make_run("adam", 1, nll=[0.8]))))
    assert ("details", {}) in page.elements
    assert cells(page, "1")[0] == ["1", "0.900 91.0 %", "0.800 91.0 %"]
    assert cells(page, "2")[0] == ["2", "0.400 92.0 %", "–"]


def test_diverged_run(make_run, make_summary, write):
    summary = make_summary(
        make_run("sgd", 1, nll=[0.9, 0.4]), *(make_run("paper", 4, seed=s, nll=[0.9, float("nan")]) for s in (0, 1))
    )
    assert cells(Page(write(summary)), "paper")[0][4:6] == ["diverged", "–"]


@pytest.mark.parametrize("where", ["dataset", "method", "environment"])
def test_escapes_names(make_run, make_summary, write, where):
    evil = "<script>alert(1)</script>-->\"'&"
    summary = make_summary(
        make_run(evil if where == "method" else "sgd", 1, nll=[0.9, 0.4]),
        dataset=evil if where == "dataset" else "digits",
    )
    page = Page(write(summary, torch=evil if where == "environment" else "2.13.0"))
    assert "script" not in {tag for tag, _ in page.elements}
    assert any("<script>alert(1)</script>" in text for text in page.texts)


def test_report_before_the_first_epoch(make_run, make_summary, write):
    page = Page(write(make_summary(make_run("sgd", 1, nll=[]))))
    assert ["No epoch has finished yet. "] in page.rows
