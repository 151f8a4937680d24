"""One look for all pictures, light and dark: colours, and the rules that use them.

Whoever looks chooses between light and dark (``prefers-color-scheme``), in pages and in files.
Colours of series are those of Okabe and Ito, darker on white and lighter on black: they are told
apart with every kind of colour blindness, and series differ in shape as well. Shades rise in
lightness alone, away from the background.
"""

THEMES: dict[str, dict[str, str]] = {
    "light": {
        "paper": "#ffffff",
        "panel": "#f5f6f8",
        "ink": "#1b1f24",
        "soft": "#59626d",
        "line": "#dfe3e8",
        "accent": "#0b5fad",
        "alarm": "#a8201a",
    },
    "dark": {
        "paper": "#14171b",
        "panel": "#1e2227",
        "ink": "#e8eaed",
        "soft": "#a2abb5",
        "line": "#343a42",
        "accent": "#78b8f5",
        "alarm": "#ff8a80",
    },
}
SERIES = {
    "light": ("#0072b2", "#c44e00", "#00795a", "#8f4a86", "#8a6d00", "#59626d"),
    "dark": ("#5cb8f5", "#ff9e4a", "#3ccf9f", "#e99bcb", "#e8c547", "#a2abb5"),
}
SHADES = {  # small to large
    "light": (
        *("#fff6dd", "#fee7b3", "#fed17f", "#fdb057", "#f18a35", "#d9641a", "#b54807", "#872f06"),
        "#571d04",
    ),
    "dark": (
        *("#2a2238", "#472a4b", "#69305a", "#8d395e", "#b04758", "#d9654f", "#ec7d3d", "#f9a646"),
        "#fbd777",
    ),
}
COUNT = len(SERIES["light"])  # of series that can be told apart
STEPS = len(SHADES["light"])
FONT = "system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif"
MARKERS = ("circle", "square", "diamond", "triangle", "cross", "circle")
DASHES = ("none", "7 3", "2 3", "8 3 2 3", "12 4", "1 4")

RULES = f"""
.t{{font:10px {FONT};fill:var(--ink)}}
.small{{font-size:9px}}
.large{{font-size:14px;font-weight:600}}
.bold{{font-weight:600}}
.soft{{fill:var(--soft)}}
.alarm{{fill:var(--alarm)}}
.halo{{paint-order:stroke;stroke:var(--paper);stroke-width:3px;stroke-linejoin:round}}
.grid{{stroke:var(--line)}}
.axis{{stroke:var(--soft)}}
.guide{{stroke:var(--ink)}}
.band{{fill:var(--panel)}}
.curve{{stroke-width:1.6;fill:none;stroke-linejoin:round}}
.area{{fill-opacity:.22}}
.tint{{fill-opacity:.35}}
.dot{{fill-opacity:.75}}
.far{{fill:none;stroke-width:1.2}}
.ring{{fill:none;stroke:var(--ink);stroke-width:1.4}}
.back{{fill:var(--paper)}}
.sense{{fill:transparent}}
.sense:hover{{fill:var(--ink);fill-opacity:.1}}
"""


def rules() -> str:
    """CSS of all pictures: variables for both themes, and what uses them."""
    each = [f".f{i}{{fill:var(--s{i})}}.l{i}{{stroke:var(--s{i})}}" for i in range(COUNT)]
    each += [f".h{i}{{fill:var(--h{i})}}.on{i}{{fill:var(--t{i})}}" for i in range(STEPS)]
    return (
        f":root{{color-scheme:light dark;{_variables('light')}}}\n"
        f"@media (prefers-color-scheme:dark){{:root{{{_variables('dark')}}}}}\n"
        f"{RULES.strip()}\n" + "\n".join(each)
    )


def _variables(theme: str) -> str:
    named = dict(THEMES[theme])
    named |= {f"s{i}": colour for i, colour in enumerate(SERIES[theme])}
    named |= {f"h{i}": colour for i, colour in enumerate(SHADES[theme])}
    named |= {f"t{i}": text_on(colour) for i, colour in enumerate(SHADES[theme])}
    return "".join(f"--{name}:{colour};" for name, colour in named.items())


def text_on(colour: str) -> str:
    """The colour of text on ``colour``: ink or paper, whichever has more contrast."""
    ink, paper = THEMES["light"]["ink"], THEMES["light"]["paper"]
    return max((ink, paper), key=lambda text: contrast(text, colour))


def contrast(one: str, other: str) -> float:
    """The ratio of contrast of two colours ``#rrggbb``, from 1 to 21 (WCAG 2.1, 1.4.3)."""
    lighter, darker = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
