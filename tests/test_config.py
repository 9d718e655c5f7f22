"""The configuration: names that make flags, trips through JSON, errors that say where, and what a
run needs on disk.

pytest tests/test_config.py
"""

import argparse
import dataclasses
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from xsam.cli import CONFIGS, add_config_flags, apply_flags
from xsam.config import Config, LossConfig, ModelConfig, Stage, xsam
from xsam.toy.preset import toy

NOT_FLAGS = {"name", "model", "stages", "loss", "categories"}


def field_names(*kinds) -> list[str]:
    return [entry.name for kind in kinds for entry in dataclasses.fields(kind)]


def parse(*arguments: str) -> dict:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_config_flags(parser)
    return vars(parser.parse_args(arguments))


def changed(path: tuple, value) -> dict:
    """The toy configuration as JSON gives it, with the value at `path` replaced."""
    values = json.loads(json.dumps(toy().to_dict()))
    *owners, name = path
    owner = values
    for key in owners:
        owner = owner[key]
    owner[name] = value
    return values


# ---- presets -------------------------------------------------------------------------------------


def test_field_names_are_unique():
    """A flag carries a field's name only, so two owners of one name could not both be meant."""
    counts = Counter(field_names(ModelConfig, Stage, LossConfig, Config))
    assert [name for name, count in counts.items() if count > 1] == []


@pytest.mark.parametrize("name", CONFIGS)
def test_presets_agree_with_themselves(name):
    config = CONFIGS[name]()
    model = config.model
    assert config.name == name
    assert len(model.connector_scales) == len(model.connector_layers)
    assert max(model.connector_layers) <= model.seg_depth
    assert max(model.seg_global_blocks) < model.seg_depth
    assert model.seg_dim % model.seg_heads == 0 == model.decoder_dim % model.decoder_heads
    for number, stage in config.stages.items():
        assert stage.global_batch_size % stage.micro_batch_size == 0
        assert all(earlier < number for earlier in stage.starts_from)


def test_presets_share_nothing():
    """`toy` starts from `xsam()`, and flags are written into a configuration in place."""
    before = xsam().to_dict()
    config = toy()
    config.model.llm_config["hidden_size"] = 1
    config.stages[1].learning_rates[""] = 1.0
    config.loss.num_points = 1
    assert xsam().to_dict() == before


def test_importing_config_imports_no_torch():
    """A wrong flag is reported before the heavy imports; only a fresh process can tell."""
    program = "import sys, xsam.config; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "[]"


# ---- dictionaries --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_through_json(name):
    """JSON knows neither tuples nor integer keys; `==` tells them from lists and strings."""
    config = CONFIGS[name]()
    config.categories = ({"name": "circle", "is_thing": True},)
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_an_integer_becomes_a_float():
    config = Config.from_dict(changed(("loss", "class_weight"), 2))
    assert type(config.loss.class_weight) is float


@pytest.mark.parametrize(
    ("path", "value", "where"),
    [
        (("queries",), 3, "config: unknown name queries"),
        (("model", "queries"), 3, "config.model: unknown name queries"),
        (("stages", "2", "lr"), 3, "config.stages.2: unknown name lr"),
        (("model", "num_queries"), "many", "config.model.num_queries"),
        (("model", "num_queries"), 2.5, "config.model.num_queries"),
        (("model", "llm_config"), "phi3", "config.model.llm_config"),
        (("model", "seg_global_blocks"), [1, "3"], "config.model.seg_global_blocks"),
        (("loss", "class_weight"), True, "config.loss.class_weight"),
        (("loss", "ignore_unlabelled"), 1, "config.loss.ignore_unlabelled"),
        (("stages", "1", "weight_decay"), None, "config.stages.1.weight_decay"),
        (("stages", "1", "learning_rates"), {"": "fast"}, "config.stages.1.learning_rates"),
        (("seed",), "0", "config.seed"),
    ],
)
def test_errors_name_the_place(path, value, where):
    with pytest.raises(ValueError, match=where.replace(".", r"\.")):
        Config.from_dict(changed(path, value))


@pytest.mark.parametrize(
    ("path", "value", "where"),
    [
        (("stages", "1", "datasets"), "refcoco", "config.stages.1.datasets"),
        (("stages", "1", "learning_rates"), [1e-3], "config.stages.1.learning_rates"),
        (("model", "connector_layers"), 3, "config.model.connector_layers"),
        (("stages", "one"), {}, "config.stages"),
        (("model", "num_queries"), True, "config.model.num_queries"),
    ],
)
def test_errors_name_the_place_of_a_wrong_container(path, value, where):
    with pytest.raises(ValueError, match=where.replace(".", r"\.")):
        Config.from_dict(changed(path, value))


def test_a_missing_name_is_an_error():
    values = toy().to_dict()
    del values["model"]
    with pytest.raises(ValueError, match=r"config: .*model"):
        Config.from_dict(values)


# ---- flags ---------------------------------------------------------------------------------------


def test_every_field_has_a_flag_and_nothing_is_set_by_default():
    parser = argparse.ArgumentParser()
    add_config_flags(parser)
    flags = {action.dest for action in parser._actions} - {"help"}
    assert flags == set(field_names(ModelConfig, Stage, LossConfig, Config)) - NOT_FLAGS
    assert parse() == {}


@pytest.mark.parametrize(
    ("flag", "text", "value"),
    [
        ("num_queries", "40", 40),
        ("logit_clamp", "2", 2.0),
        ("weight_decay", "5e-2", 0.05),
        ("llm", "phi3-toy", "phi3-toy"),
        ("connector_scales", "4,2,1,0.5", (4.0, 2.0, 1.0, 0.5)),
        ("seg_global_blocks", "1", (1,)),
        ("scale_range", "", ()),
        ("datasets", "refcoco,refcoco+", ("refcoco", "refcoco+")),
        ("learning_rates", '{"": 0, "llm": 1e-3}', {"": 0.0, "llm": 1e-3}),
        (
            "llm_config",
            '{"model_type": "phi3", "vocab_size": 9}',
            dict(model_type="phi3", vocab_size=9),
        ),
        ("ignore_unlabelled", "false", False),
        ("ignore_unlabelled", "True", True),
    ],
)
def test_flags_are_read_as_their_fields(flag, text, value):
    parsed = parse(f"--{flag}", text)
    assert parsed == {flag: value}
    assert type(parsed[flag]) is type(value)


@pytest.mark.parametrize(
    ("flag", "text"),
    [
        ("num_queries", "4.5"),
        ("logit_clamp", "high"),
        ("seg_global_blocks", "1,x"),
        ("learning_rates", "1e-3"),
        ("learning_rates", '{"": "fast"}'),
        ("llm_config", "{model_type: phi3}"),
        ("ignore_unlabelled", "no"),
        ("queries", "3"),
    ],
)
def test_a_wrong_flag_ends_the_program_and_is_named(flag, text, capsys):
    with pytest.raises(SystemExit) as leaving:
        parse(f"--{flag}", text)
    assert leaving.value.code == 2
    assert f"--{flag}" in capsys.readouterr().err


def test_flags_reach_their_owner_and_only_the_stages_run():
    before, config = toy(), toy()
    flags = parse(
        "--num_queries", "7", "--num_points", "9", "--seed", "5", "--epochs", "2",
        "--learning_rates", '{"": 1e-6}',
    )  # fmt: skip
    assert apply_flags(config, flags, [1, 3]) is config
    assert (config.model.num_queries, config.loss.num_points, config.seed) == (7, 9, 5)
    for number in (1, 3):
        expected = dataclasses.replace(before.stages[number], epochs=2.0, learning_rates={"": 1e-6})
        assert config.stages[number] == expected
    assert config.stages[2] == before.stages[2]
    # Nothing else moved.
    config.model.num_queries = before.model.num_queries
    config.loss.num_points, config.seed = before.loss.num_points, before.seed
    config.stages = before.stages
    assert config == before
