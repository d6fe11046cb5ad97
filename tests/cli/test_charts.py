from hypothesis import given
from hypothesis import strategies as st

from minigpt.cli.charts import curve


@given(
    values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300),
    width=st.integers(1, 80),
    height=st.integers(2, 20),
)
def test_each_column_has_one_point(values: list[float], width: int, height: int) -> None:
    lines = curve(values, width=width, height=height, label="x").splitlines()
    assert len(lines) == height + 2
    plot = [line.partition("|")[2].ljust(width) for line in lines[:height]]
    for column in range(min(width, len(values))):
        assert sum(row[column] == "*" for row in plot) == 1


def test_a_falling_curve_falls() -> None:
    lines = curve([4.0, 3.0, 2.0, 1.0], height=4).splitlines()
    assert [line.partition("|")[2].find("*") for line in lines[:4]] == [0, 1, 2, 3]
    assert lines[0].startswith("   4.000 |")
