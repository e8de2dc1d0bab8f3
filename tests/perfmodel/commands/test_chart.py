"""The chart: bars as high as their bytes, a line at the limit, nothing from elsewhere."""

from __future__ import annotations

from xml.etree import ElementTree

from perfmodel.commands.chart import TIERS, Column, chart

SVG = "{http://www.w3.org/2000/svg}"
GIB = 1 << 30
COLUMNS = [Column("1", (4 * GIB, 2 * GIB, 0)), Column("2", (8 * GIB, 2 * GIB, GIB), fits=False)]


def drawn() -> ElementTree.Element:
    return ElementTree.fromstring(
        chart(COLUMNS, title="a <b> & c", x_label="seq-len", limit_bytes=6 * GIB)
    )


def bars(colour: str) -> list[ElementTree.Element]:
    """Return those of a tier; the legend's squares have no title."""
    found = drawn().iter(f"{SVG}rect")
    return [each for each in found if each.get("fill") == colour and len(each)]


def test_a_bar_is_as_high_as_its_bytes() -> None:
    (device, *_), (host, *_) = (bars(colour) for _, colour in TIERS[:2])
    assert abs(float(device.get("height", 0)) - 2 * float(host.get("height", 0))) < 0.2
    assert [len(bars(colour)) for _, colour in TIERS] == [2, 2, 1]
    low = float(host.get("y", 0)) + float(host.get("height", 0))
    assert abs(low - float(device.get("y", 0))) < 0.2, "the host's bytes stand on the device's"


def test_labels_axes_and_the_limit_are_said() -> None:
    words = {each.text for each in drawn().iter(f"{SVG}text")}
    assert {"a <b> & c", "seq-len", "GiB of a rank", "1", "2", "pale: does not fit"} <= words
    assert "device limit: 6 GiB" in words


def test_it_stands_alone() -> None:
    text = chart(COLUMNS, title="", x_label="", limit_bytes=1)
    assert text.count("http") == 1, "the namespace, and no file or script"


def test_a_chart_of_nothing_is_one() -> None:
    ElementTree.fromstring(chart([], title="", x_label="", limit_bytes=0))
