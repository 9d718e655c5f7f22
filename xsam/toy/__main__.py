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
    about = "Write the toy world: FOLDER/data, FOLDER/weights"
    parser = Parser(prog="python -m xsam.toy", description=about)
    parser.add_argument("folder", type=Path, help="where to write; made if need be")
    for name, default in (("seed", 0), ("num_train", 1600), ("num_val", 64)):
        parser.add_argument(f"--{name}", type=count, default=default, help="default: %(default)s")
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
