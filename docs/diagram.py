"""Draws the README's diagram, light and dark: `python docs/diagram.py` writes docs/diagram*.svg.

A box is a part of the model (paper figure 3) with the file that holds it.
"""

from html import escape
from pathlib import Path

BOXES = (  # x, y, width, height, title, file
    (8, 92, 96, 48, "image", "data.py"),
    (8, 262, 264, 66, "names, phrases,|questions, marks", "prompts.py"),
    (140, 15, 132, 66, "segmentation|encoder (SAM)", "encoders.py"),
    (140, 150, 132, 66, "image encoder|(SigLIP2)", "encoders.py"),
    (312, -34, 140, 48, "connector", "connector.py"),
    (312, 24, 140, 48, "seg. projector", "connector.py"),
    (312, 96, 140, 48, "region sampler", "connector.py"),
    (312, 159, 140, 48, "image projector", "connector.py"),
    (498, -34, 148, 48, "pixel decoder", "decoder.py"),
    (498, 24, 148, 304, "language model|(Phi-3-mini)", "llm.py"),
    (716, -34, 156, 100, "masked-attention|decoder|200 queries", "decoder.py"),
    (716, 140, 156, 48, "LLM projector", "connector.py"),
    (716, 271, 156, 48, "answer", ""),
    (908, -34, 84, 44, "masks", ""),
    (908, 22, 84, 44, "classes", ""),
)

ARROWS = (  # points of a line; its label, where that stands and ends
    ([(104, 104), (122, 104), (122, 48), (140, 48)], "", 0, 0, ""),
    ([(104, 126), (122, 126), (122, 183), (140, 183)], "", 0, 0, ""),
    ([(206, 15), (206, -10), (312, -10)], "three layers", 214, -18, "start"),
    ([(272, 48), (312, 48)], "", 0, 0, ""),
    ([(382, 72), (382, 96)], "", 0, 0, ""),
    ([(272, 183), (312, 183)], "", 0, 0, ""),
    ([(272, 295), (498, 295)], "tokens; names in <p>…</p>", 286, 286, "start"),
    ([(452, -10), (498, -10)], "", 0, 0, ""),
    ([(452, 48), (498, 48)], "", 0, 0, ""),
    ([(452, 120), (498, 120)], "", 0, 0, ""),
    ([(452, 183), (498, 183)], "", 0, 0, ""),
    ([(646, -10), (716, -10)], "", 0, 0, ""),
    ([(646, 164), (716, 164)], "", 0, 0, ""),
    ([(646, 295), (716, 295)], "", 0, 0, ""),
    ([(756, 140), (756, 66)], "<p>…</p>:|conditions", 748, 98, "end"),
    ([(832, 140), (832, 66)], "<SEG>:|what to segment", 840, 98, "start"),
    ([(872, -12), (908, -12)], "", 0, 0, ""),
    ([(872, 44), (908, 44)], "", 0, 0, ""),
)
NOTE = (
    "data.py makes the batches, model.py joins the parts, losses.py compares masks and words with"
)
NOTE_2 = "the truth, optimizer.py steps, train.py is the loop, and config.py has every number."

COLOURS = {
    "diagram.svg": dict(text="#1f2328", dim="#59636e", box="#ffffff", edge="#8c959f"),
    "diagram-dark.svg": dict(text="#e6edf3", dim="#9198a1", box="#161b22", edge="#6e7681"),
}  # fmt: skip
FILL = {"encoders.py": 0, "connector.py": 1, "llm.py": 2, "decoder.py": 3}
TINTS = {
    "diagram.svg": ("#ddf4ff", "#fff8c5", "#fbefff", "#dafbe1"),
    "diagram-dark.svg": ("#0c2d6b", "#4b2900", "#3c1e70", "#033a16"),
}


def draw(name: str) -> str:
    """The diagram as SVG, in the colours of a file name."""
    colour, tints = COLOURS[name], TINTS[name]
    font = "font-family='system-ui,Segoe UI,Helvetica,Arial,sans-serif'"
    parts = [
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 -46 1000 424' role='img'"
        f" aria-label='X-SAM: data flow, and the file of every part' {font} font-size='14'>",
        "<defs><marker id='head' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='8' "
        f"markerHeight='8' orient='auto'><path d='M0 0 8 4 0 8z' fill='{colour['dim']}'/>"
        "</marker></defs>",
    ]
    for points, label, x, y, anchor in ARROWS:
        line = " ".join(f"{across},{down}" for across, down in points)
        parts.append(
            f"<polyline points='{line}' fill='none' stroke='{colour['dim']}' stroke-width='1.5' "
            "marker-end='url(#head)'/>"
        )
        for number, words in enumerate(label.split("|") if label else []):
            parts.append(
                f"<text x='{x}' y='{y + 15 * number}' font-size='12' text-anchor='{anchor}' "
                f"fill='{colour['dim']}'>{escape(words, quote=False)}</text>"
            )
    for x, y, width, height, title, file in BOXES:
        fill = tints[FILL[file]] if file in FILL else colour["box"]
        parts.append(
            f"<rect x='{x}' y='{y}' width='{width}' height='{height}' rx='7' fill='{fill}' "
            f"stroke='{colour['edge']}'/>"
        )
        lines = [(line, "600", colour["text"]) for line in title.split("|")]
        lines += [(file, "400", colour["dim"])] * bool(file)
        top = y + height / 2 - 9 * (len(lines) - 1) + 5
        for number, (line, weight, fill) in enumerate(lines):
            parts.append(
                f"<text x='{x + width / 2:g}' y='{top + 18 * number:g}' text-anchor='middle' "
                f"font-weight='{weight}' fill='{fill}'>{escape(line, quote=False)}</text>"
            )
    for number, note in enumerate((NOTE, NOTE_2)):
        parts.append(f"<text x='8' y='{351 + 18 * number}' fill='{colour['dim']}'>{note}</text>")
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    for name in COLOURS:
        (Path(__file__).parent / name).write_text(draw(name), encoding="utf-8")
