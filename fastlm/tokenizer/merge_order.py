"""Merges by score written as a list in order, for formats that have no scores.

Among merges of one score the leftmost in the text comes first, which no list says in general. It can when merges of one
score never meet in a text, and for the one kind of ties that published vocabularies have: runs of a character (spaces,
line ends), all of one score. There the longest result goes first, so that a run that has begun to grow grows on.
"""

from __future__ import annotations

from itertools import combinations, groupby, pairwise

from fastlm.errors import TokenizerError

Merge = tuple[str, str, int]
"""Two pieces, and the priority of merging them; the lowest comes first."""


def in_order(merges: list[Merge]) -> list[tuple[str, str]]:
    """The pairs of `merges` in an order that merges every text alike.

    Raises:
        TokenizerError: merges of one score meet in some text in a way that no order is known for.
    """
    ordered = sorted(merges, key=lambda merge: (merge[2], -len(merge[0] + merge[1])))
    for _, group in groupby(ordered, key=lambda merge: merge[2]):
        tied = list(group)
        if len(tied) > 1:
            _check_ties(tied)
    return [(left, right) for left, right, _ in ordered]


def _check_ties(tied: list[Merge]) -> None:
    runs: dict[str, list[Merge]] = {}
    others = []
    for merge in tied:
        characters = set(merge[0] + merge[1])
        if len(characters) == 1:
            runs.setdefault(characters.pop(), []).append(merge)
        else:
            others.append(merge)
    # Runs of different characters never meet, and what is no run must meet nothing, itself included.
    for first, second in [*combinations(others, 2), *((a, b) for a in others for run in runs.values() for b in run)]:
        if _meet(first, second) or _meet(second, first):
            raise TokenizerError(
                f"the pieces {first[0] + first[1]!r} and {second[0] + second[1]!r} have the same score and meet in "
                "text, which a list of merges cannot say"
            )
    for character, run in runs.items():
        by_score = {(len(left), len(right)): 0 for left, right, _ in run}
        by_list = {(len(left), len(right)): i for i, (left, right, _) in enumerate(run)}
        longest = max(map(sum, by_score))
        if any(_merge_run(n, by_score) != _merge_run(n, by_list) for n in range(4 * longest + 2)):
            raise TokenizerError(f"runs of {character!r} have one score and merge in an order that no list says")


def _meet(first: Merge, second: Merge) -> bool:
    """Whether `first` can stand right before `second` and share a piece with it, or make a piece of it."""
    made = first[0] + first[1]
    return first[1] == second[0] or made in second[:2]


def _merge_run(length: int, priorities: dict[tuple[int, int], int]) -> list[int]:
    """Lengths of the pieces that a run becomes: the lowest priority first, the leftmost among equals."""
    parts = [1] * length
    while True:
        found = [(priorities[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in priorities]
        if not found:
            return parts
        _, at = min(found)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
