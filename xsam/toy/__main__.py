"""The command `python -m xsam.toy FOLDER`: writes the toy world, its data and its weights.

python -m xsam.toy /tmp/toy --num_train 1600 --num_val 64
"""

import argparse
from pathlib import Path

from xsam.toy.preset import toy
from xsam.toy.world import write_world


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the toy world: FOLDER/data, FOLDER/weights")
    parser.add_argument("folder", type=Path, help="where to write; made if need be")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--num_train", type=int, default=1600, help="default: %(default)s")
    parser.add_argument("--num_val", type=int, default=64, help="default: %(default)s")
    arguments = parser.parse_args()
    from xsam.toy.weights import write_weights  # after the flags are read, as torch takes seconds

    folder = arguments.folder
    write_world(folder / "data", arguments.num_train, arguments.num_val, arguments.seed)
    write_weights(folder / "weights", toy().model, arguments.seed)


if __name__ == "__main__":
    main()
