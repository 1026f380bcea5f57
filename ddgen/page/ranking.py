"""Whether sets are good for choosing models, as the report page shows it: correlations, a picture, all accuracies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ddgen.page.html import Cell, esc, number, paragraph, table, text
from ddgen.page.pictures import round_ticks

SIDE, LEFT, RIGHT, TOP, BOTTOM = 240, 32, 14, 26, 38  # of a panel, in units of its own


def ranking_parts(found: Mapping[str, Any] | None) -> list[str]:
    """Returns what results.json says of the ranking as HTML, or nothing.

    Args:
        found: Its `ranking`.
    """
    if not found:
        return []
    ours = frozenset(index for index, one in enumerate(found["sets"]) if one["images"] == "distilled")
    header = [text("images"), number("epochs"), number("Spearman"), number("Kendall")]
    body = [
        [text(one["images"]), number(one["epochs"]), _correlation(one["spearman"]), _correlation(one["kendall"])]
        for one in found["sets"]
    ]
    caption = f"Rank correlation with training on all real images, {found['confidence']:.0%} bootstrap interval below"
    return [
        "<h3>Choosing models</h3>",
        paragraph(_explanation(found), "note"),
        table(caption, header, body, ours),
        _scatter(found),
        "<details><summary>Every candidate</summary>\n" + _candidates(found) + "\n</details>",
    ]


def _explanation(found: Mapping[str, Any]) -> str:
    by = f" by {found['teacher']}" if found.get("teacher") else ""
    sentences = [
        f"Do the images order {len(found['candidates'])} candidates as all real images do? Each trains once on every "
        f"set, by {found['protocol']}{by}, and for {found['real_epochs']} epochs on all real images, and is scored on "
        "the real test images. 1 is the same order, 0 no relation. No score above is chosen by this."
    ]
    sentences += [f"{name}: the loss diverged, which counts as chance." for name in found.get("diverged") or ()]
    return " ".join(sentences)


def _correlation(found: Mapping[str, float | None]) -> Cell:
    if found["value"] is None:
        return number("-")
    return number(f"{found['value']:.2f}", f"{found['low']:.2f} to {found['high']:.2f}")


def _candidates(found: Mapping[str, Any]) -> str:
    header = [text("network"), number("learning rate", "times the recipe's"), number("all real"),
              *(number(one["images"]) for one in found["sets"])]  # fmt: skip
    body = [
        [text(candidate["network"]), number(f"{candidate['lr_factor']:g}"),
         number(f"{100 * found['real_accuracies'][index]:.1f}"),
         *(number(f"{100 * one['accuracies'][index]:.1f}") for one in found["sets"])]
        for index, candidate in enumerate(found["candidates"])
    ]  # fmt: skip
    return table("Top-1 accuracy in percent after training on each set", header, body)


def _scatter(found: Mapping[str, Any]) -> str:
    """A panel per set, all with the same axes: accuracy after the set against accuracy after all real images."""
    real = found["real_accuracies"]
    across = _axis(real)
    up = _axis([accuracy for one in found["sets"] for accuracy in one["accuracies"]])
    panels = "".join(_panel(one, found["candidates"], real, across, up) for one in found["sets"])
    caption = (
        "Every point is a candidate: across, its accuracy in percent after training on all real images; up, after "
        "training on the set. The better a set orders the candidates, the steadier the points rise."
    )
    return f'<figure class="panels"><div>{panels}</div><figcaption>{esc(caption)}</figcaption></figure>'


def _axis(accuracies: Sequence[float]) -> list[float]:
    """Returns round percentages from below the least to above the most."""
    return round_ticks(100 * min(accuracies), 100 * max(accuracies))


def _panel(
    one: Mapping[str, Any],
    candidates: Sequence[Mapping[str, Any]],
    real: Sequence[float],
    across: Sequence[float],
    up: Sequence[float],
) -> str:
    def x_of(percent: float) -> float:
        return LEFT + (percent - across[0]) / (across[-1] - across[0]) * (SIDE - LEFT - RIGHT)

    def y_of(percent: float) -> float:
        return SIDE - BOTTOM - (percent - up[0]) / (up[-1] - up[0]) * (SIDE - TOP - BOTTOM)

    colour = "var(--accent)" if one["images"] == "distilled" else "var(--second)"
    rho = one["spearman"]["value"]
    title = one["images"] + ("" if rho is None else f", Spearman {rho:.2f}")
    parts = [f'<text x="0" y="14" font-size="12" font-weight="600" fill="currentColor">{esc(title)}</text>']
    parts += [_horizontal(y_of(tick), tick) for tick in up] + [_vertical(x_of(tick), tick) for tick in across]
    parts.append(
        f'<text x="{(LEFT + SIDE - RIGHT) / 2:.0f}" y="{SIDE - 5}" text-anchor="middle" font-size="11" '
        'fill="currentColor">after all real images</text>'
    )
    for candidate, first, second in zip(candidates, real, one["accuracies"], strict=True):
        told = (
            f"{candidate['network']}, learning rate x {candidate['lr_factor']:g}: {100 * first:.1f}, {100 * second:.1f}"
        )
        parts.append(
            f'<g><title>{esc(told)}</title><circle cx="{x_of(100 * first):.1f}" cy="{y_of(100 * second):.1f}" r="4" '
            f'fill="{colour}" fill-opacity=".75"/></g>'
        )
    spoken = f"{title}: accuracy of {len(candidates)} candidates after training on the set and on all real images"
    return f'<svg viewBox="0 0 {SIDE} {SIDE}" role="img" aria-label="{esc(spoken)}">{"".join(parts)}</svg>'


def _horizontal(y: float, tick: float) -> str:
    return (
        f'<line x1="{LEFT}" x2="{SIDE - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--rule)"/>'
        f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end" font-size="11" fill="currentColor">{tick:g}</text>'
    )


def _vertical(x: float, tick: float) -> str:
    return (
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{SIDE - BOTTOM}" stroke="var(--rule)"/>'
        f'<text x="{x:.1f}" y="{SIDE - BOTTOM + 15}" text-anchor="middle" font-size="11" fill="currentColor">{tick:g}'
        "</text>"
    )
