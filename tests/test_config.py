"""The configuration: it never changes, `resolve` makes another, names make flags, trips through
JSON, errors that say where.

pytest tests/test_config.py
"""

import argparse
import copy
import dataclasses
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from xsam.cli import CONFIGS, add_config_flags
from xsam.cli import parse as parse_command
from xsam.config import ARCHITECTURES, Config, LossConfig, ModelConfig, Stage, xsam
from xsam.encoders import transformers_config
from xsam.toy.preset import toy

NOT_KNOWN = {"model", "stages", "loss"}  # to `resolve`
NOT_FLAGS = NOT_KNOWN | {"name", "categories", "init"}  # --init is a list of paths


def field_names(*kinds) -> list[str]:
    return [entry.name for kind in kinds for entry in dataclasses.fields(kind)]


def parse(*arguments: str) -> dict:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_config_flags(parser, xsam())
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
    """`toy` starts from `xsam()`; nobody should write into a dict of a configuration."""
    before = xsam().to_dict()
    config = toy()
    config.model.llm_config["hidden_size"] = 1
    config.stages[1].learning_rates[""] = 1.0
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


# ---- one configuration from another --------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "name"),
    [
        (lambda config: config, "seed"),
        (lambda config: config.model, "num_queries"),
        (lambda config: config.loss, "num_points"),
        (lambda config: config.stages[2], "epochs"),
    ],
    ids=["Config", "ModelConfig", "LossConfig", "Stage"],
)
def test_nothing_of_a_configuration_can_be_assigned(config, part, name):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(part(config), name, 1)
    assert config == toy()


def test_resolve_takes_a_field_of_each_kind_and_changes_nothing_else(config):
    resolved = config.resolve(num_queries=7, num_points=9, seed=5, epochs=2.0)
    assert config == toy()
    expected = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_queries=7),
        loss=dataclasses.replace(config.loss, num_points=9),
        stages={n: dataclasses.replace(row, epochs=2.0) for n, row in config.stages.items()},
        seed=5,
    )
    assert resolved == expected


def test_resolve_reaches_the_stages_it_is_given(config):
    resolved = config.resolve(stages=(1, 3), learning_rates={"": 1e-6})
    assert [resolved.stages[n].learning_rates == {"": 1e-6} for n in (1, 2, 3)] == [
        True,
        False,
        True,
    ]
    assert resolved.stages[2] == config.stages[2] and config == toy()


def test_a_resolved_configuration_shares_no_dict_with_another(config):
    """Nor with what it was given, nor with the table of architectures."""
    before, given = copy.deepcopy(ARCHITECTURES), {"model_type": "siglip_vision_model"}
    resolved = config.resolve(llm="vicuna-7b-v1.5", image_encoder_config=given, seed=1)
    for each in (resolved.model.llm_config, resolved.model.image_encoder_config):
        each["hidden_size"] = 1
    resolved.stages[1].learning_rates[""] = 1.0
    assert config == toy() and before == ARCHITECTURES and "hidden_size" not in given


@pytest.mark.parametrize("part", ARCHITECTURES)
def test_the_name_of_a_part_brings_its_architecture_unless_a_field_says_otherwise(part):
    name, brought = list(ARCHITECTURES[part].items())[-1]
    resolved = xsam().resolve(**{part: name}).model
    assert getattr(resolved, part) == name
    assert brought and all(getattr(resolved, field) == brought[field] for field in brought)
    field, other = next(iter(brought)), getattr(toy().model, next(iter(brought)))
    assert other != brought[field]
    for order in ({part: name, field: other}, {field: other, part: name}):
        assert getattr(xsam().resolve(**order).model, field) == other


def test_an_unknown_stage_is_refused(config):
    with pytest.raises(ValueError, match=r"stages \[7\]: there are 1, 2, 3"):
        config.resolve(stages=(7,), max_steps=1)


def test_an_unknown_seg_encoder_is_refused_with_those_that_are_known(config):
    with pytest.raises(
        ValueError, match=r"unknown seg_encoder sam-vit-giant; known are sam-vit-ba"
    ):
        config.resolve(seg_encoder="sam-vit-giant")
    assert config.resolve(seg_encoder=config.model.seg_encoder) == config


@pytest.mark.parametrize("name", ["queries", "model", "lr"])
def test_an_unknown_field_is_refused_with_those_that_are_known(config, name):
    known = ", ".join(sorted({*field_names(ModelConfig, Stage, LossConfig, Config)} - NOT_KNOWN))
    with pytest.raises(ValueError) as error:
        config.resolve(seed=1, **{name: 3})
    assert str(error.value) == f"unknown field {name}; known are {known}"


def test_a_value_of_another_type_is_refused(config):
    with pytest.raises(ValueError, match=r"config\.model\.num_queries: expected int, got 'many'"):
        config.resolve(num_queries="many")


def test_transformers_writes_into_a_copy_of_a_configurations_dict():
    """It completes the frequencies of positions in place."""
    values = toy().model.llm_config | {"model_type": "llama", "rope_theta": 5.0}
    values["rope_scaling"] = {"type": "linear", "factor": 2.0}
    before = copy.deepcopy(values)
    assert transformers_config(values).rope_parameters["rope_theta"] == 5.0
    assert values == before


# ---- dictionaries --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_through_json(name):
    """JSON knows neither tuples nor integer keys; `==` tells them from lists and strings."""
    config = CONFIGS[name]().resolve(categories=({"name": "circle", "is_thing": True},))
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
    add_config_flags(parser, xsam())
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
    """`--init` stands in place of what the first of them would start from."""
    flags = ["--num_queries", "7", "--num_points", "9", "--seed", "5", "--epochs", "2"]
    flags += ["--init", "step_1", "--config", "toy", "--stage", "3"]
    expected = toy().resolve(
        stages=(3,),
        num_queries=7,
        num_points=9,
        seed=5,
        epochs=2.0,
        starts_from=(),
        init=("step_1",),
    )
    assert toy().stages[3].starts_from and parse_command(flags)[1] == expected
