"""Proves xsam on one GPU in under eight minutes; --rehearse does the same on a CPU at toy size.

    python benchmarks/gpu.py --out runs/gpu
    python benchmarks/gpu.py --out runs/rehearsal --rehearse

It needs no network, weights or datasets, and no packages but the library's own. Each part is a
process with a time limit, so that a crash in one does not cost the others. The most expensive parts
come last:

    toy                the commands on the toy: training, kill and resume, evaluation (toy_run.py)
    parity             parts against transformers', the criterion against the CPU (compare.py)
    times              parts beside transformers': milliseconds and memory (compare.py)
    inference          the full preset: seconds and memory of each task (full_model.py)
    training           the full preset: steps of all stages, beside the plan (full_model.py)
    compiled_training  `training` with compiled blocks (full_model.py)
    compiled           `times` with compiled blocks (compare.py)
    adapters           the full preset: steps with adapters on 24 GB, and their plan (full_model.py)

The last three do not fit into 470 s: ask for them with --parts. A further part,
`plan`, simulates on the CPU what `training` is compared with; it and `parity`, which times nothing,
run beside `toy`. OUT/gpu.json holds all records, OUT/PART.jsonl those of one part as they are made,
OUT/PART.log its output.
"""

import argparse
import datetime
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGES = ("torch", "transformers", "safetensors", "PIL", "numpy", "pycocotools", "tqdm", "scipy")
ASIDE = "plan", "parity"  # run beside another part, as they time nothing
GOALS = (  # record, figure, the least and the most that it should be
    ("stage 3, generic, usual text", "of_published_peak", 0.40, 1.0),  # of an A100 0.45
    ("stage 3, generic, longest text", "measured_by_planned", 0.9, 1.1),
    ("SAM encoder, forward", "times_faster", 1.5, None),
    ("SAM encoder, forward and backward", "times_faster", 1.5, None),
    ("SAM encoder, forward and backward", "of_peer_memory", 0.0, 1.0),
    ("decoders and losses, forward and backward", "times_faster", 1.5, None),
    ("decoders and losses, forward and backward", "of_peer_memory", 0.0, 1.0),
    ("losses, forward and backward", "times_faster", 4.0, None),
)


@dataclass
class Part:
    """A process and its status: not started, running, passed, FAILED or timed out."""

    name: str
    command: list[str]
    seconds: float  # time limit
    process: subprocess.Popen | None = None
    started: float = 0.0
    took: float = 0.0
    status: str = "not started"

    def start(self, out: Path) -> None:
        with (out / f"{self.name}.log").open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.started, self.status = time.monotonic(), "running"

    def is_over(self, until: float) -> bool:
        """Whether it has ended. Past its time limit, or past `until`, it is killed."""
        status, now = self.process.poll(), time.monotonic()
        if status is None and now < min(self.started + self.seconds, until):
            return False
        self.took, self.status = now - self.started, "passed" if status == 0 else "FAILED"
        if status is None:
            self.status = "timed out"
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        return True

    def records(self, out: Path) -> list[dict]:
        path = out / f"{self.name}.jsonl"
        if self.process is None or not path.is_file():
            return []
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def build_parts(options: argparse.Namespace, memory_gb: float) -> list[Part]:
    """All parts in the order in which they start, or those of --parts."""
    on_device, small, rounds, steps, backend = [], [], [], [], []
    if options.rehearse:
        on_device, small = ["--device", "cpu"], ["--device", "cpu", "--small"]
        rounds, steps = ["--rounds", "1"], ["--steps", "1"]
        backend = ["--backend", "eager"]  # what inductor makes for a CPU takes minutes to compile

    def part(script: str, name: str, seconds: float, *flags: str) -> Part:
        what = [] if name == "toy" else [name]
        command = [sys.executable, str(HERE / script), *what, "--out", str(options.out), *flags]
        return Part(name, command, 280 if options.rehearse else seconds)

    parts = [
        part("full_model.py", "plan", 300, "--memory", str(memory_gb), *small),
        part("compare.py", "parity", 150, *small),
        part("toy_run.py", "toy", 200, *on_device),
        part("compare.py", "times", 90, *small, *rounds),
        part("full_model.py", "inference", 120, *small, *steps),
        part("full_model.py", "training", 240, *small, *steps),
        part("full_model.py", "compiled_training", 180, *small, *steps, *backend),
        part("compare.py", "compiled", 150, *small, *rounds, *backend),
        part("full_model.py", "adapters", 240, *small, *steps),
    ]
    known = [each.name for each in parts]
    if unknown := set(options.parts or ()) - set(known):
        raise SystemExit(f"unknown part {', '.join(unknown)}; known are {', '.join(known)}")
    return [each for each in parts if not options.parts or each.name in options.parts]


def run_parts(parts: list[Part], options: argparse.Namespace, machine: dict) -> None:
    """One part at a time (two in a rehearsal), and those of ASIDE beside them. gpu.json is written
    after each part."""
    from measure import format_record

    until = time.monotonic() + options.seconds
    waiting, running, slots = list(parts), [], 2 if options.rehearse else 1
    while waiting or running:
        for part in [each for each in running if each.is_over(until)]:
            running.remove(part)
            print(f"\n---- {part.name}: {part.status}, {part.took:.0f} s")
            if part.status == "FAILED":
                print((options.out / f"{part.name}.log").read_text(encoding="utf-8")[-4000:])
            for record in part.records(options.out):
                print(format_record(record), flush=True)
            results = {
                each.name: {
                    "status": each.status,
                    "seconds": each.took,
                    "records": each.records(options.out),
                }
                for each in parts
            }
            text = json.dumps({"machine": machine, "parts": results}, indent=1)
            (options.out / "gpu.json").write_text(text, encoding="utf-8")
        if time.monotonic() > until:
            waiting.clear()
        while waiting and sum(each.name not in ASIDE for each in running) < slots:
            running.append(waiting.pop(0))
            running[-1].start(options.out)
        time.sleep(0.2)


def describe_machine() -> dict:
    """Card, versions and date. Read in another process, so that this one holds no GPU memory."""
    code = (
        "import json, torch, transformers; is_there = torch.cuda.is_available(); "
        "card = torch.cuda.get_device_properties(0) if is_there else None; "
        "print(json.dumps({'card': card and card.name, "
        "'memory_gb': card and card.total_memory / 1e9, 'torch': torch.__version__, "
        "'cuda': torch.version.cuda, 'transformers': transformers.__version__}))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    machine = json.loads(result.stdout) | {"python": platform.python_version()}
    now = datetime.datetime.now().isoformat(timespec="seconds")
    return machine | {"cores": os.cpu_count(), "date": now}


def check_packages() -> None:
    """Raises SystemExit where a package is missing, with the commands that bring it to a machine
    without a network."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        names = " ".join("pillow" if name == "PIL" else name for name in missing)
        python = ".".join(platform.python_version_tuple()[:2])
        platforms = [f"{each}_{platform.machine()}" for each in ("manylinux_2_28", "manylinux2014")]
        raise SystemExit(
            f"missing: {names}. On a machine with a network, then here:\n"
            "  pip download --no-deps --only-binary=:all: -d wheels --python-version "
            f"{python} --platform {' --platform '.join(platforms)} {names}\n"
            "  pip install --no-index --no-deps wheels/*.whl"
        )
    print(f"packages: {', '.join(PACKAGES)}: all installed")


def print_goals(records: dict[str, dict], card: str) -> None:
    print("\n| goal (of a GPU, at full size) | | reached | |\n|---|---|---|---|")
    for name, figure, least, most in GOALS:
        least = 0.45 if figure == "of_published_peak" and "A100" in card else least
        value = records.get(name, {}).get(figure)
        limits = f"at least {least}" if most is None else f"{least} to {most}"
        reached, verdict = "not measured", ""
        if value is not None:
            is_met = value >= least and (most is None or value <= most)
            reached, verdict = f"{value:.3g}", "yes" if is_met else "no"
        print(f"| {name}: {figure} | {limits} | {reached} | {verdict} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a new folder for the results")
    parser.add_argument("--rehearse", action="store_true", help="run on the CPU, at toy size")
    parser.add_argument("--parts", nargs="+", metavar="PART", help="run these parts alone")
    parser.add_argument(
        "--seconds", type=float, default=470, help="time for all parts (default: 470)"
    )
    options = parser.parse_args()
    check_packages()
    if options.out.exists():
        parser.error(f"{options.out} is there already; give another --out")
    options.out.mkdir(parents=True)
    paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if options.rehearse:
        os.environ["OMP_NUM_THREADS"] = "1"  # as two parts run at a time
    started, machine = time.monotonic(), describe_machine()
    print(json.dumps(machine), flush=True)
    if not options.rehearse and machine["card"] is None:
        raise SystemExit("PyTorch finds no CUDA GPU here; --rehearse goes without")
    parts = build_parts(options, machine["memory_gb"] or 80.0)
    run_parts(parts, options, machine)
    records = {each["name"]: each for part in parts for each in part.records(options.out)}
    print_goals(records, machine["card"] or "")
    print(f"\n{', '.join(f'{part.name} {part.status}' for part in parts)}")
    print(f"{time.monotonic() - started:.0f} s; all records: {options.out / 'gpu.json'}")
    return int(any(part.status != "passed" for part in parts))


if __name__ == "__main__":
    sys.exit(main())
