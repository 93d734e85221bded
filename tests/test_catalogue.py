"""The table of faults in docs/reliability.md: every row is there, and every test that it names."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROWS = {"T": 21, "C": 20, "D": 15, "F": 8, "H": 12, "S": 8}


def rows() -> dict[str, str]:
    """Row -> its last cell."""
    lines = [line for line in (ROOT / "docs" / "reliability.md").read_text().splitlines() if re.match(r"\| [TCDFHS]\d+ \|", line)]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({row[0] for row in cells}) == len(cells)
    return {row[0]: row[-1] for row in cells}


def test_no_row_is_missing() -> None:
    assert rows().keys() == {f"{letter}{number}" for letter, most in ROWS.items() for number in range(1, most + 1)}


def test_every_named_test_is_there() -> None:
    for row, said in rows().items():
        if said.startswith("left out: "):
            continue
        for named in said.split(", "):
            path, _, name = named.strip("`").partition("::")
            assert (ROOT / path).is_file(), (row, path)
            assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.MULTILINE), (row, named)
