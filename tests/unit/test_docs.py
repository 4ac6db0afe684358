"""What the documentation points at is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_way_of_a_token_leads_through_files_that_exist() -> None:
    text = (ROOT / "docs" / "how-a-token-is-made.md").read_text(encoding="utf-8")
    paths = re.findall(r"`((?:router|workers|understudy|cluster|models)/[^` ]+)`", text)
    assert len(paths) > 15
    assert [path for path in paths if not (ROOT / path).exists()] == []
