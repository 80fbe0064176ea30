"""`sapper explain --html`: the report as one page that needs no network.

Enters: the facts of explain.py. Leaves: the text of the page: explain.html with the facts in it as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .explain import by_hand_lines, measured_lines

_PLACE = "__FACTS__"


def page(facts: Mapping[str, Any]) -> str:
    """The page. What would end the script that holds the facts is escaped."""
    template = Path(__file__).with_name("explain.html").read_text(encoding="utf-8")
    lines = [*by_hand_lines(facts), *measured_lines(facts)]
    content = json.dumps({**facts, "measured_lines": lines}, separators=(",", ":"))
    return template.replace(_PLACE, content.replace("<", "\\u003c").replace("\u2028", "\\u2028"))
