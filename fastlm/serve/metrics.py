"""Counts of the server in Prometheus's text format, version 0.0.4."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from fastlm.inference import Stats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
REQUEST_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
FIRST_TOKEN_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
NEXT_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Histogram:
    """How many values lay at or below each of `bounds`."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def lines(self, name: str) -> Iterable[str]:
        below = 0
        for bound, count in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            below += count
            yield f'{name}_bucket{{le="{bound}"}} {below}'
        yield f"{name}_sum {self.total}"
        yield f"{name}_count {below}"


@dataclass
class Metrics:
    """What happened since the server began. For its event loop's thread alone."""

    in_flight: int = 0
    requests: Counter[tuple[str, int]] = field(default_factory=Counter)  # (path of the route, status)
    request_seconds: Histogram = field(default_factory=lambda: Histogram(REQUEST_SECONDS))
    first_token_seconds: Histogram = field(default_factory=lambda: Histogram(FIRST_TOKEN_SECONDS))
    next_token_seconds: Histogram = field(default_factory=lambda: Histogram(NEXT_TOKEN_SECONDS))

    def count_request(self, path: str, status: int, seconds: float) -> None:
        self.requests[path, status] += 1
        self.request_seconds.add(seconds)

    def text(self, stats: Stats, admitted: int, places: int) -> str:
        lines: list[str] = []

        def family(name: str, kind: str, help_text: str, samples: Iterable[str]) -> None:
            lines.extend((f"# HELP fastlm_{name} {help_text}", f"# TYPE fastlm_{name} {kind}", *samples))

        def number(name: str, kind: str, help_text: str, value: float) -> None:
            family(name, kind, help_text, [f"fastlm_{name} {value}"])

        family(
            "requests_total", "counter", "Requests by route and status.",
            [
                f'fastlm_requests_total{{path="{path}",status="{status}"}} {count}'
                for (path, status), count in sorted(self.requests.items())
            ],
        )  # fmt: skip
        number("requests_in_flight", "gauge", "Requests that are being answered.", self.in_flight)
        number("texts_admitted", "gauge", "Texts that are written or wait for it.", admitted)
        number("texts_places", "gauge", "Most texts that are admitted; more are refused with 429.", places)
        for histogram, name, help_text in (
            (self.request_seconds, "request_seconds", "From a request's first byte to its answer's last."),
            (self.first_token_seconds, "first_token_seconds", "From a request's first byte to its first token."),
            (self.next_token_seconds, "next_token_seconds", "Between two tokens of one text."),
        ):
            family(name, "histogram", help_text, histogram.lines(f"fastlm_{name}"))
        for name, kind, help_text, value in (
            ("engine_steps_total", "counter", "Steps of the engine.", stats.steps),
            ("prompt_tokens_total", "counter", "Tokens of prompts.", stats.prompt_tokens),
            ("generated_tokens_total", "counter", "Tokens that were generated.", stats.generated_tokens),
            ("prefix_hit_tokens_total", "counter", "Tokens of prompts found in the cache.", stats.prefix_hit_tokens),
            ("preemptions_total", "counter", "Texts that gave their blocks to another.", stats.preemptions),
            ("finished_total", "counter", "Engine requests that came to their end.", stats.finished),
            ("cancelled_total", "counter", "Engine requests that were cancelled.", stats.cancelled),
            ("failed_total", "counter", "Texts that ended with an error.", stats.failed),
            ("waiting", "gauge", "Texts that wait.", stats.waiting),
            ("running", "gauge", "Texts that are written.", stats.running),
            ("cache_blocks_used", "gauge", "Blocks of keys and values in use.", stats.blocks_used),
            ("cache_blocks", "gauge", "Blocks of keys and values in all.", stats.blocks_total),
            ("cache_block_tokens", "gauge", "Tokens a block.", stats.block_size),
        ):
            number(name, kind, help_text, value)
        return "\n".join(lines) + "\n"
