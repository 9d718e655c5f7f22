"""A page in the browser that asks a model.

python -m xsam.demo --checkpoint runs/toy/stage3
python -m xsam.demo --checkpoint DIR --examples photos --port 9000
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from xsam.cli import Parser, add_checkpoint_flags, count
from xsam.demo.server import LOOPBACK, DemoServer, Engine
from xsam.files import IMAGE_SUFFIXES, list_files
from xsam.images import read_image
from xsam.inference import load_with_flags
from xsam.toy.scenes import draw_scene

MAX_EXAMPLES = 8

NUM_SCENES = 4


def build_parser() -> Parser:
    """The flags of the command."""
    parser = Parser(
        prog="python -m xsam.demo",
        description="A page in the browser that asks a model. Stop it with Ctrl-C.",
        epilog="example: python -m xsam.demo --checkpoint runs/toy/stage3",
    )
    add_checkpoint_flags(parser)
    add = parser.add_argument
    text = "address to listen on (default: %(default)s, this machine alone)"
    add("--host", default="127.0.0.1", help=text)
    port = "port to listen on (default: %(default)s)"
    add("--port", type=count, default=8080, metavar="N", help=port)
    text = f"a folder whose first {MAX_EXAMPLES} pictures are offered as examples (default: "
    add("--examples", type=Path, metavar="DIR", help=f"{text}drawings of the toy world)")
    return parser


def read_examples(folder: Path | None) -> list[tuple[str, Image.Image]]:
    """Names and pictures; those that cannot be read are reported and left out. Raises ValueError
    where the folder has none."""
    if folder is None:
        scenes = [draw_scene(np.random.default_rng(seed)) for seed in range(NUM_SCENES)]
        return [(f"drawing {n}", Image.fromarray(scene.image)) for n, scene in enumerate(scenes, 1)]
    paths = list_files(folder, *IMAGE_SUFFIXES)
    examples = []
    for path in paths[:MAX_EXAMPLES]:
        try:
            examples.append((path.name, read_image(path)))
        except ValueError as error:
            print(f"xsam.demo: {error}", file=sys.stderr)
    if not examples:
        raise ValueError(f"{folder}: no pictures in it ({', '.join(IMAGE_SUFFIXES)})")
    return examples


def main(arguments: list[str] | None = None) -> int:
    """Serves the page until Ctrl-C; returns the exit status, 2 at bad input."""
    options = build_parser().parse_args(arguments)
    try:
        examples = read_examples(options.examples)
        model, stage = load_with_flags(options)
        title = f"{model.config.name}, stage {stage}"
        server = DemoServer((options.host, options.port), Engine(model), examples, title)
    except (ValueError, OSError, OverflowError) as error:
        print(f"xsam.demo: {error}", file=sys.stderr)
        return 2
    if options.host not in LOOPBACK:
        print(
            f"warning: anyone who reaches {options.host} can use this page: it has no password, "
            "and what is sent is not encrypted",
            file=sys.stderr,
        )
    host = f"[{options.host}]" if ":" in options.host else options.host
    print(f"http://{host}:{server.server_port} (Ctrl-C stops it)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()
    finally:
        server.server_close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
