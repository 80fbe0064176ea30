"""Counts of a server as Prometheus reads them (text format 0.0.4)."""

from __future__ import annotations

from bisect import bisect_left

BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Seconds: the buckets of a histogram."""


class Histogram:
    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)
        self.sum = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.sum += seconds

    def lines(self, name: str) -> list[str]:
        total, lines = 0, []
        for bound, count in zip((*map(str, BOUNDS), "+Inf"), self.counts, strict=True):
            total += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*lines, f"{name}_sum {self.sum:.6f}", f"{name}_count {total}"]


class Metrics:
    """requests: (path, status) -> how many. first_token, whole: seconds from a request to these."""

    def __init__(self) -> None:
        self.requests: dict[tuple[str, int], int] = {}
        self.prompt_tokens = self.cancelled = 0
        self.first_token, self.whole = Histogram(), Histogram()

    def count(self, path: str, status: int) -> None:
        self.requests[path, status] = self.requests.get((path, status), 0) + 1

    def text(self, gauges: dict[str, tuple[str, float]], counters: dict[str, tuple[str, float]]) -> str:
        """gauges, counters: name -> (help, value), of what is counted elsewhere."""
        counters = {**counters, "sapper_prompt_tokens_total": ("Tokens of prompts.", self.prompt_tokens),
                    "sapper_cancelled_total": ("Requests whose client left.", self.cancelled)}
        lines = ["# HELP sapper_requests_total Requests answered.", "# TYPE sapper_requests_total counter"]
        lines += [f'sapper_requests_total{{path="{path}",status="{status}"}} {count}'
                  for (path, status), count in sorted(self.requests.items())]
        for kind, values in (("gauge", gauges), ("counter", counters)):
            for name, (told, value) in values.items():
                lines += [f"# HELP {name} {told}", f"# TYPE {name} {kind}", f"{name} {value:g}"]
        for name, told, histogram in (
                ("sapper_first_token_seconds", "From a request to its first token.", self.first_token),
                ("sapper_request_seconds", "From a request to its end.", self.whole)):
            lines += [f"# HELP {name} {told}", f"# TYPE {name} histogram", *histogram.lines(name)]
        return "\n".join(lines) + "\n"
