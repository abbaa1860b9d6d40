"""Prints how many inputs each test drew."""

import fuzzing


def pytest_terminal_summary(terminalreporter):
    if fuzzing.drawn:
        terminalreporter.section("inputs drawn")
        for name, count in sorted(fuzzing.drawn.items()):
            terminalreporter.write_line(f"{count:7,}  {name}")
        terminalreporter.write_line(f"{sum(fuzzing.drawn.values()):7,}  in all")
