"""Claims about CONTRIBUTING's table of half hours:
the row of the shipped model is that of its log.
"""

import csv
import re

from lib.env.paths import RESULTS, ROOT


def test_the_first_row_is_in_the_log():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    bits, minutes = re.search(
        r"^\| ([\d.]+) \| ([\d.]+) \| CPU.*step 2,000", text, re.MULTILINE
    ).groups()
    with open(RESULTS / "training_log.csv", newline="") as file:
        row = next(row for row in csv.DictReader(file) if row["step"] == "2000")
    assert f"{float(row['validation_bits_per_note']):.2f}" == bits
    assert f"{float(row['minutes']):.1f}" == minutes
