"""``ptq formats``: what it says is what the code does."""

import json

from command_line import Run

from ptq.cli.formats import ADA, BLACKWELL, GUIDE, opens
from ptq.numerics.formats import FORMATS


def test_every_format_is_in_the_guide():
    assert set(GUIDE) == set(FORMATS)
    assert {native for native, _ in GUIDE.values()} == {BLACKWELL, ADA, "none"}


def test_who_opens_what():
    """As the writer chooses a dialect for the default recipe."""
    assert opens("nvfp4", "w4a4") == "all"
    assert opens("mxfp4", "w4a16") == "vLLM, ptq"  # rotated
    assert opens("nvint4", "w4a4") == "vLLM*, ptq"  # with the plugin, where that was run
    assert opens("mxint8", "w4a16") == "ptq"


def test_the_table_and_its_json(ptq: Run):
    table = ptq("formats").out
    found = json.loads(ptq("formats", "--json").out)
    assert [row["format"] for row in found] == list(GUIDE)
    assert all(row["format"] in table for row in found)
    first = found[0]
    assert (first["bits_per_weight"], first["group_size"], first["kernels"]) == (4.5, 16, True)
    assert not next(row for row in found if row["format"] == "mxint6")["kernels"]


def test_what_units_cost_is_shown_beside_what_is_published(ptq: Run):
    found = {row["format"]: row for row in json.loads(ptq("formats", "--json").out)}
    assert found["mxfp8"]["area"] == found["mxfp8"]["paper_area"] == 1
    assert found["nvint4"]["paper_energy"] == 0.34 and found["mxfp4"]["paper_area"] is None
    assert found["nvint4"]["area"] < found["nvfp4"]["area"] < found["mxint8"]["area"] < 1
    for name, row in found.items():  # a native format has a rate, others have none
        assert (row["blackwell"] is not None) == (row["native"] != "none"), name
