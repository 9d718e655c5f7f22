"""How well a score tells the phrases that are in an image from those that are not.

    python xsam/evaluate.py --checkpoint runs/toy/stage3 --data runs/toy/world/data --tasks grefer
    python benchmarks/presence.py --predictions runs/toy/stage3 --data runs/toy/world/data

Reads the predictions of gRefCOCO that evaluate.py wrote with `presence` 0, and prints what each
value of it would do: the share of the absent phrases that are refused (N_acc), the share of the
present ones that keep their mask (T_acc, their recall), and the precision of these masks. A phrase
that the model refused in words stays refused. With --out it also draws precision against recall.
"""

import argparse
from pathlib import Path

import numpy as np

from xsam.datasets.registry import open_dataset
from xsam.datasets.sources import sets_by_task
from xsam.evaluation.benchmarks import cell
from xsam.evaluation.prediction_files import SavedPredictions


def read_scores(folder: Path, data: Path, sets: list[str]) -> tuple[list[float], list[bool]]:
    """The best score of every expression of the sets, and whether anything fits it."""
    scores, is_present = [], []
    for name in sets:
        predictions = SavedPredictions(folder / name, dataset := open_dataset(name, data))
        indices = range(len(predictions.keys))
        scores += [predictions.mask_score(index) for index in indices]
        is_present += [dataset.is_present(index) for index in indices]
    return scores, is_present


def presence_curve(
    scores: list[float], is_present: list[bool], thresholds: list[float]
) -> list[dict[str, float | None]]:
    """What each threshold would do, from the best score of every phrase (-inf where it got no mask
    at all). Figures are in percent, None where there is nothing to count."""
    scores, is_present = np.array(scores), np.array(is_present, bool)
    curve = []
    for threshold in thresholds:
        is_kept = (scores >= threshold) & (scores > -np.inf)
        shares = {
            "N_acc": ~is_kept[~is_present],
            "T_acc": is_kept[is_present],
            "precision": is_present[is_kept],
        }
        figures = {name: 100 * x.mean() if len(x) else None for name, x in shares.items()}
        curve.append({"threshold": threshold} | figures)
    return curve


def draw(path: Path, curve: list[dict], name: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    points = [(each["T_acc"], each["precision"]) for each in curve if each["precision"] is not None]
    axes.plot(*zip(*points, strict=True), marker=".")
    axes.set(xlabel="recall (T_acc), %", ylabel="precision, %", title=f"present phrases, {name}")
    axes.grid(color="0.9")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--predictions", type=Path, required=True, help="folder with one for each set")
    add("--data", type=Path, default=Path("datas"), help="data root (default: datas)")
    add("--sets", default="", help="sets of gRefCOCO (default: all that are predicted)")
    add("--steps", type=int, default=20, help="thresholds between 0 and 1 (default: 20)")
    add("--out", type=Path, help="picture of the curve to write; needs matplotlib")
    options = parser.parse_args()
    folder = options.predictions
    folder = folder / "predictions" if (folder / "predictions").is_dir() else folder
    known = sets_by_task()["grefer"]
    sets = [each for each in known if (folder / each).is_dir()]
    sets = options.sets.split(",") if options.sets else sets
    if not sets or not set(sets) <= set(known):
        parser.error(f"{folder}: give predictions of {', '.join(known)}")
    scores, is_present = read_scores(folder, options.data, sets)
    print(f"{', '.join(sets)}: {len(scores)} phrases, {sum(is_present)} of them present\n")
    curve = presence_curve(
        scores, is_present, [k / options.steps for k in range(options.steps + 1)]
    )
    print("| presence | N_acc | T_acc = recall | precision |\n|---|---|---|---|")
    for each in curve:
        threshold, *figures = each.values()
        cells = [cell(figure) for figure in figures]
        print(f"| {threshold:.2f} | {' | '.join(cells)} |")
    if options.out:
        draw(options.out, curve, ", ".join(sets))


if __name__ == "__main__":
    main()
