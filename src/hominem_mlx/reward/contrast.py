"""Contrast edits in a regression: what an edit and its original share says little, how they differ says much.

With errors `e` of all rows the least of `|e|^2 + weight * sum (e_edit - e_original)^2 = e'(I + weight * L)e` is sought,
`L` the Laplacian of the graph of edits. That is generalised least squares (Aitken 1936) for errors that an edit and its
original have in common. With `A = (I + weight * L)^(1/2)` it is the plain regression of `A y` on `A x`: and since a
constant stays one under `A` and prompts are never mixed, intercept, folds and bootstrap by prompt stay what they were.

Shapes: `N` rows, `C` columns.
"""

from collections.abc import Sequence

import numpy as np


class Contrasts:
    """The rows that edits join, and the roots of their matrices."""

    def __init__(
        self, edits: Sequence[tuple[int, int]], groups: Sequence[str] | np.ndarray, labels: np.ndarray, weight: float
    ):
        """Joins each edit with its original where they have the same prompt and labels for the same outputs.

        Args:
            edits: row of the edit, row of its original.
            groups: the prompt of each row.
            labels: `[N, O]`, NaN where there is none.
            weight: of a difference, where a row by itself weighs 1; >= 0.
        """
        there = ~np.isnan(labels)
        edges = [(a, b) for a, b in edits if groups[a] == groups[b] and (there[a] == there[b]).all()]
        self._blocks = []
        edges_of: dict[int, list[tuple[int, int]]] = {}
        for a, b in edges:
            edges_of.setdefault(a, []).append((a, b))
        for rows in _joined(edges):
            place = {row: index for index, row in enumerate(rows)}
            laplacian = np.zeros((len(rows), len(rows)))
            for a, b in ((place[a], place[b]) for row in rows for a, b in edges_of.get(row, ())):
                laplacian[[a, b], [a, b]] += 1
                laplacian[[a, b], [b, a]] -= 1
            values, vectors = np.linalg.eigh(laplacian)
            roots = np.sqrt(1 + weight * np.maximum(values, 0.0))
            self._blocks.append((rows, (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T))

    def __bool__(self) -> bool:
        return bool(self._blocks)

    def apply(self, values: np.ndarray) -> np.ndarray:
        """`A` times `[N, C]`."""
        return self._times(values, 1)

    def undo(self, values: np.ndarray) -> np.ndarray:
        """The inverse of `A` times `[N, C]`."""
        return self._times(values, 2)

    def _times(self, values: np.ndarray, which: int) -> np.ndarray:
        made = values.copy()
        for block in self._blocks:
            made[block[0]] = block[which] @ values[block[0]]
        return made


def _joined(edges: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Rows that edges connect, each set of them once, in order."""
    owner: dict[int, list[int]] = {}
    for a, b in edges:
        one, other = owner.setdefault(a, [a]), owner.setdefault(b, [b])
        if one is not other:
            one += other
            owner.update(dict.fromkeys(other, one))
    return sorted({id(rows): sorted(rows) for rows in owner.values()}.values())
