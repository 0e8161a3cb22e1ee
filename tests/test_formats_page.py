"""docs/FORMATS.md shows one example of every record, and every example loads."""

import json
import re
from pathlib import Path

import pytest

from hominem_mlx import records

PAGE = (Path(__file__).parents[1] / "docs" / "FORMATS.md").read_text()
EXAMPLES = dict(re.findall(r"## (\w+)\n(?:(?!\n## ).)*?```json\n(.*?)\n```", PAGE, flags=re.DOTALL))
NAMES = [
    name
    for name, value in vars(records).items()
    if isinstance(value, type) and issubclass(value, records.Record) and name not in ("Record", "Reward")
]


def test_every_record_has_its_example():
    assert sorted(EXAMPLES) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_example_is_one_line_that_loads_and_uses_known_fields_only(name):
    row = json.loads(EXAMPLES[name])
    model = getattr(records, name)
    assert "\n" not in EXAMPLES[name]
    model.model_validate(row)
    assert set(row) <= set(model.model_fields)
