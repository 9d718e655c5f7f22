"""The figures of several runs of the toy, with their mean and spread: docs/toy.md and the README.

    python benchmarks/seeds.py runs/toy runs/toy-1 runs/toy-2

Each run is a folder in which `--stage all --seed N` left results.json. The columns of stages are
those of the first.
"""

import argparse
import json
from pathlib import Path

from xsam.evaluation.benchmarks import cell, scored_tasks

FIVE = {  # the README's rows
    "panoptic segmentation, PQ": ("panoptic", "PQ"),
    "referring segmentation, cIoU": ("refer", "cIoU"),
    "grounded conversation, mIoU": ("gcg", "mIoU"),
    "a marked object, mIoU from a point": ("interactive", "mIoU point"),
    "yes or no about the picture, POPE accuracy": ("chat", "accuracy POPE"),
}


def spread(runs: list[dict], task: str, name: str) -> tuple[str, str]:
    """The mean over runs after stage 3, and the lowest and highest."""
    figures = [run[task][name] for run in runs]
    if None in figures:
        return "–", "–"
    return f"{sum(figures) / len(figures):.1f}", f"{min(figures):.1f} to {max(figures):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, one for each seed")
    folders = parser.parse_args().runs
    runs = [json.loads((folder / "results.json").read_text("utf-8")) for folder in folders]
    print(f"| the toy run after stage 3, {len(runs)} seeds | mean | lowest to highest |")
    print("|---|---|---|")
    for title, (task, name) in FIVE.items():
        print(f"| {title} | {' | '.join(spread(runs, task, name))} |")
    tasks, columns = scored_tasks(), runs[0]["columns"]
    heads = ["task", "metric", *columns, "mean", "lowest to highest", "paper", "protocol"]
    print(f"\n| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for task in tasks:
        for name in runs[0].get(task, {}):
            stages = [cell(scores.get(task, {}).get(name)) for scores in columns.values()]
            paper = cell(tasks[task].paper.get(name))
            protocol = tasks[task].protocols[name.split()[0]]
            row = [task, name, *stages, *spread(runs, task, name), paper, protocol]
            print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
