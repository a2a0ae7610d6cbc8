from runtime_py.report import table


def test_columns_line_up() -> None:
    assert table(("a", "long"), [("first", "1"), ("x", "22")]).splitlines() == [
        "| a     | long |",
        "| ----- | ---: |",
        "| first |    1 |",
        "| x     |   22 |",
    ]
