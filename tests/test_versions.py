"""The versions that are promised are those that the suite is run with: see tests/versions/run.

pytest tests/test_versions.py
"""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def pinned(name: str) -> dict[str, tuple[int, ...]]:
    lines = (ROOT / f"tests/versions/{name}.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if not line.startswith("#")]
    return {name: tuple(map(int, version.split("."))) for name, version in pins}


def test_the_bounds_of_every_package_are_the_lowest_set():
    text = (ROOT / "pyproject.toml").read_text()
    bounds = re.findall(r'"([a-z-]+)>=([\d.]+)(?:,<\d+)?"', text)
    promised = {name: tuple(map(int, version.split("."))) for name, version in bounds}
    del promised["setuptools"], promised["ruff"]  # which no result depends on
    lowest, newest = pinned("lowest"), pinned("newest")
    assert promised.keys() == lowest.keys() == newest.keys()
    for name, version in promised.items():
        # "2.6" of the bound is "2.6.0" of the set
        assert version == lowest[name][: len(version)] and not any(lowest[name][len(version) :])
        assert lowest[name] <= newest[name]
