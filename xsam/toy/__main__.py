"""The command `python -m xsam.toy FOLDER`: writes the toy world, its data and its weights.

python -m xsam.toy /tmp/toy --num_train 1600 --num_val 64
"""

import sys
from pathlib import Path

from xsam.cli import Parser, count
from xsam.files import refuse_existing
from xsam.toy.preset import toy
from xsam.toy.world import write_world


def main() -> int:
    """Writes the folder that is named and returns the exit status, 2 at bad input."""
    parser = Parser(
        prog="python -m xsam.toy",
        description="Writes the toy world: FOLDER/data, FOLDER/weights.",
    )
    add, default = parser.add_argument, "(default: %(default)s)"
    add("folder", type=Path, help="where to write; made if need be")
    add("--seed", type=count, default=0, help=f"seed of what is drawn and trained {default}")
    add("--num_train", type=count, default=1600, help=f"images to train on {default}")
    add("--num_val", type=count, default=64, help=f"images to score on {default}")
    arguments = parser.parse_args()
    from xsam.toy.weights import write_weights  # after the flags are read, as torch takes seconds

    data, weights = arguments.folder / "data", arguments.folder / "weights"
    try:
        refuse_existing(data, weights)
        write_world(data, arguments.num_train, arguments.num_val, arguments.seed)
        write_weights(weights, toy().model, arguments.seed, num_workers=2)
    except (ValueError, OSError) as error:
        print(f"xsam.toy: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
