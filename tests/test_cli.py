"""The command lines: what a run needs, uses and leaves random is checked and printed before
anything starts, and a name that matches nothing is an error.

pytest tests/test_cli.py
"""

import argparse
import copy
import dataclasses
import importlib
import json
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path

import faulty_train
import pytest
from PIL import Image

from xsam import evaluate as evaluate_command
from xsam.checkpoints import find_checkpoint, save_checkpoint
from xsam.cli import NO_FLAGS, field_comments, parse, preflight, train_command
from xsam.config import PARTS, Config, LossConfig, ModelConfig, Stage, part_names, xsam
from xsam.datasets.registry import open_dataset
from xsam.inference import load_checkpoint
from xsam.model import XSAM, Segmentor
from xsam.optimizer import freeze
from xsam.toy.preset import toy
from xsam.weights import parameters_on_meta, part_name

ROOT = Path(__file__).parent.parent
SMALL = ["--max_steps", "1", "--global_batch_size", "2", "--micro_batch_size", "2"]
SMALL += ["--num_workers", "0", "--num_points", "64"]


@pytest.fixture(scope="module")
def run_folder(model, segmentor, tmp_path_factory) -> Path:
    """What a finished run leaves: a checkpoint of each stage, and the run's own config.json."""
    out = tmp_path_factory.mktemp("runs") / "toy"
    config, model = model.config, copy.deepcopy(model)
    save_checkpoint(out / "stage1", segmentor, segmentor.config, None, 1, 3, {})
    freeze(model, config.stages[2], "")
    save_checkpoint(out / "stage2", model, config, model.tokenizer, 2, 3, {})
    freeze(model, config.stages[3], "")
    for step in (3, 12):
        save_checkpoint(out / "stage3", model, config, model.tokenizer, 3, step, {})
    (out / "config.json").write_text(json.dumps(config.to_dict()))
    return out


def refusal(arguments: list, capsys) -> str:
    """What the training command says when it refuses to start."""
    with pytest.raises(SystemExit) as leaving:
        train_command(list(map(str, arguments)))
    assert leaving.value.code == 2
    return capsys.readouterr().err


def toy_run(out: Path, data: Path, *flags: object) -> list[str]:
    return ["--config", "toy", "--out", str(out), "--data", str(data), *SMALL, *map(str, flags)]


# ---- flags ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--stage 1 --eval_tasks panoptik", "unknown task panoptik; known are panoptic, instance"),
        ("--stage 1 --eval_tasks panoptic,none", "unknown task none"),
        ("--stage 1 --eval_tasks refer", "stage 1 is scored on none of these"),
        ("--stage 3 --num_validation 0", "num_validation is 0; it has to be more than 0"),
        ("--stage 3 --eval_tasks= --validate_every 9", "name the tasks to validate"),
        ("--stage 1 --datasets refcoco", "refcoco is of refer"),
        ("--stage all --datasets llava_pretrain", "llava_pretrain is of chat"),
        ("--stage 1 --datasets +refcoco", "refcoco is of refer"),
        ("--stage 3 --datasets +coco_panoptik", "unknown dataset 'coco_panoptik'"),
        ("--stage 3 --datasets=", "datasets names none"),
        ("--stage 3 --datasets coco_panoptik", "unknown dataset 'coco_panoptik'"),
        ('--stage 3 --learning_rates {"vision_encoder":0}', "parts are segmentor.encoder, segm"),
        ('--stage 3 --learning_rates {"llmm":0,"":1}', "no part 'llmm'"),
        ('--stage 3 --learning_rates {"llm.":0,"":1}', "no part 'llm.'"),
        ('--stage 1 --learning_rates {"llm":0,"":1}', "no part 'llm'"),
        ('--stage 3 --learning_rates {"llm":0}', "none for segmentor.encoder, segmentor.connector"),
        ('--stage 3 --learning_rates {"llm":0,"":0}', "leaves nothing to train"),
        ('--stage 3 --learning_rates {"":-1}', "a learning rate in [-1.0]"),
        ('--stage 3 --learning_rates {"":1,"llm_projector":0}', "random llm_projector, and does"),
        ("--stage 3 --starts_from 2", "begins with random segmentor.connector"),
        ("--stage 3 --starts_from 3", "not earlier stages"),
        ("--stage all --starts_from=", "begins with random"),
        ("--stage 3 --starts_from 1 --init x", "give one of them"),
        ("--stage 3 --allow-missing llm.", "for the checkpoints of --init"),
        ("--stage 1 --gpus 4", "--gpus is for --plan"),
        ("--stage 1 --plan --gpus 0", "--gpus is 0"),
        ("--stage 1 --micro_batch_size 0", "micro_batch_size is 0"),
        ("--stage 1 --epochs 0", "epochs is 0.0"),
        ("--stage 1 --keep_checkpoints 0", "keep_checkpoints is 0"),
        ("--stage 1 --weight_decay nan", "weight_decay is nan"),
        ("--stage 1 --max_steps 5 --max_steps -1", "max_steps is -1; it has to be 0 or more"),
        ("--stage 1 --out a --out b", "--out is given more than once"),
        ("--stage 1 --datasets a --datasets=b", "--datasets is given more than once"),
        ("--stage 1 --overlap_threshold 1.5", "overlap_threshold is 1.5; it is 1 at most"),
        ("--stage 3 --presence 1.5", "presence is 1.5; it is 1 at most"),
        (
            "--stage 1 --connector_layers 2,3,5",
            "connector_layers has [5]; of an encoder of depth 4",
        ),
        ("--stage 1 --seg_global_blocks 1,4", "seg_global_blocks has [4]"),
        ("--stage 3 --decoder_heads 7", "decoder_dim 64 is not a multiple of decoder_heads 7"),
        ("--stage 3 --seg_heads 0", "seg_heads is 0"),
        ("--stage 1 --scale_range 2", "not a least and a largest scale"),
        ("--stage 1 --scale_range 2,0.5", "not a least and a largest scale"),
        ("--stage 1 --dtype float16", "'float16' is none of float32, bfloat16"),
        ("--stage 1 --phrasings nowhere.json", "nowhere.json: cannot be read"),
    ],
)
def test_what_no_run_can_mean_is_refused_in_a_line(flags, message, capsys):
    error = refusal(["--config", "toy", *flags.split()], capsys)
    assert message in error and error.count("\n") == 1 and "--help" in error


@pytest.mark.parametrize(
    ("stage", "text", "added"),
    [
        (3, "+grefcoco", ("grefcoco",)),
        (3, "+grefcoco,mine.json:photos", ("grefcoco", "mine.json:photos")),
        (3, "+refcoco,grefcoco", ("grefcoco",)),  # what is there already stays one
        (1, "+coco_instance", ("coco_instance",)),
    ],
)
def test_datasets_with_a_plus_add_to_the_stages_own(stage, text, added):
    options, config = parse(["--stage", str(stage), "--datasets", text])
    for number, row in xsam().stages.items():
        expected = (*row.datasets, *added) if number == stage else row.datasets
        assert config.stages[number].datasets == expected
    assert options.stages == [stage]


def read_parsers(command, monkeypatch) -> list[argparse.ArgumentParser]:
    """The parser of a command, and those of its sub-commands."""
    found = []

    def parse_args(parser, *_) -> None:
        found.append(parser)
        sys.exit()

    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, parse_args)
    with pytest.raises(SystemExit):
        command()
    for action in found[0]._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += action.choices.values()
    return found


def benchmark_command(path: Path, monkeypatch):
    monkeypatch.syspath_prepend(path.parent)
    return importlib.import_module(path.stem).main


BENCHMARKS = [x for x in (ROOT / "benchmarks").glob("*.py") if "__main__" in x.read_text()]
COMMANDS = [
    "xsam.cli:train_command",
    "xsam.evaluate:main",
    "xsam.predict:main",
    "xsam.toy.__main__:main",
]
COMMANDS += ["xsam.demo.__main__:main", "xsam.export:main", "xsam.datasets.commands:main"]


@pytest.mark.parametrize("command", [*COMMANDS, *BENCHMARKS], ids=lambda x: getattr(x, "stem", x))
def test_help_describes_every_flag_of_every_command(command, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["command"])
    if isinstance(command, Path):
        main = benchmark_command(command, monkeypatch)
    else:
        module, _, name = command.partition(":")
        main = getattr(importlib.import_module(module), name)
    for parser in read_parsers(main, monkeypatch):
        assert parser.description
        for action in parser._actions:
            if not isinstance(action, argparse._SubParsersAction):
                text = parser._get_formatter()._expand_help(action) if action.help else ""
                words = text.partition("default:")[0].split()
                assert len(words) > 1, f"{parser.prog}: {action.option_strings or action.dest}"
        parser.epilog = None  # an example may be longer
        for columns in (80, 100):
            monkeypatch.setenv("COLUMNS", str(columns))
            for line in parser.format_help().splitlines():
                assert len(line) <= columns, f"{parser.prog}: {line}"


@dataclasses.dataclass
class Sizes:
    # ---- a heading
    # what stands above,
    # in two lines
    above: int = 1
    beside: dict = dataclasses.field(  # what stands beside
        default_factory=dict
    )
    bare: int = 3


def test_the_help_of_a_field_is_its_comment(monkeypatch):
    """Compared with the comments as Python's own tokenizer finds them."""
    assert field_comments(Sizes) == {
        "above": "what stands above, in two lines",
        "beside": "what stands beside",
        "bare": "",
    }
    (parser,) = read_parsers(lambda: train_command(["--stage", "1"]), monkeypatch)
    helps = {action.dest: action.help for action in parser._actions}
    with (ROOT / "xsam/config.py").open() as source:
        tokens = tokenize.generate_tokens(source.readline)
        comments = " ".join(x.string[2:] for x in tokens if x.type == tokenize.COMMENT)
    for kind in (ModelConfig, Stage, LossConfig, Config):
        found = field_comments(kind)
        assert list(found) == [entry.name for entry in dataclasses.fields(kind)]
        for name, comment in found.items():
            assert len(comment.split()) > 1 and comment in comments, name
            assert name in NO_FLAGS or helps[name].startswith(comment)


def test_help_has_the_values_of_the_preset(capsys):
    for config, num_queries, steps in (("xsam", 200, "0"), ("toy", 20, "stage 1 400; stage 2 240")):
        with pytest.raises(SystemExit):
            parse(["--help", "--config", config])
        text = " ".join(capsys.readouterr().out.split())
        assert f"one decoder run predicts (default: {num_queries})" in text
        assert f"as many as these need (default: {steps}" in text


def test_help_is_without_torch():
    program = "import sys; from xsam.cli import parse\n"
    program += "try: parse(['--help'])\nfinally: sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True)


def test_a_flag_error_is_told_once_and_without_torch(monkeypatch, capsys):
    program = "import sys; from xsam.cli import parse\n"
    program += "try: parse(['--stage', '3', '--learning_rates', '{\"llmm\": 0}'])\n"
    program += "finally: print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert result.stdout == "False\n" and "no part 'llmm'" in result.stderr
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert refusal(["--stage", "4"], capsys) == ""


def test_eval_tasks_none_is_explained_and_is_none(capsys):
    for text in ("none", ""):
        assert parse(["--config", "toy", "--stage", "1", "--eval_tasks", text])[1].eval_tasks == ()
    with pytest.raises(SystemExit):
        parse(["--help"])
    assert "none, or '', for none" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("changes", [{}, {"decoder": "sam", "seg_neck_dim": 64}, {"llm": "x"}])
@pytest.mark.parametrize("others", [{}, {"seg_tokens": False}, {"image_encoder": "none"}])
def test_the_table_of_parts_is_that_of_the_models(changes, others):
    changes = changes | others
    config = toy().resolve(**{"llm_config": toy().model.llm_config} | changes)
    for stage, kind in ((1, Segmentor), (3, XSAM)):
        with parameters_on_meta():
            model = kind(config)
        names = {part_name(model.prefix + name) for name, _ in model.named_parameters()}
        assert names == set(part_names(config.model, stage)) <= set(PARTS)


def test_a_backbone_with_scales_of_its_own_has_no_connector():
    config = xsam().resolve(seg_encoder="mask2former-swin-tiny-coco-panoptic")
    assert "segmentor.connector" not in part_names(config.model, 1)
    assert "segmentor.pixel_decoder" in part_names(config.model, 1)


# ---- what lies on the disk -----------------------------------------------------------------------


def test_the_sets_that_are_scored_have_to_be_there(world, tmp_path):
    for tasks, is_listed in (("panoptic", True), ("none", False), ("interactive,panoptic", True)):
        flags = toy_run(tmp_path / "out", tmp_path / "mine", "--stage", 1, "--eval_tasks", tasks)
        message = preflight(*parse(flags))
        assert "panoptic_train2017.json" in message
        assert ("panoptic_val2017.json" in message) == is_listed
        assert "coco_interactive_val" not in message  # stage 1 is not scored on it


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_a_start_that_fails_leaves_nothing(world, tmp_path, out, capsys):
    (tmp_path / "file").write_text("kept")
    flags = toy_run(tmp_path / out, world / "data", "--stage", 1, "--weights", world / "weights")
    assert train_command([*flags, "--eval_tasks", "none"]) == 2
    assert "is a file" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_resume_says_where_a_stage_goes_on(world, tmp_path, capsys):
    """A job that is started anew by the same command begins where there is nothing yet."""
    flags = toy_run(tmp_path / "out", world / "data", "--stage", 1, "--weights", world / "weights")
    flags += ["--eval_tasks", "none", "--resume"]
    for origin in ("its beginning: no checkpoint yet", "step_1"):
        assert faulty_train.main({}, flags) == 0
        assert f"--resume: stage 1 goes on from {origin}\n" in capsys.readouterr().out


def test_a_start_that_fails_in_the_model_or_the_data_leaves_nothing(world, tmp_path, capsys):
    weights = ["--weights", world / "weights", "--eval_tasks", "none"]
    for flags in (["--num_classes", 7], ["--learning_rates", '{"": 1, "segmentor.encoder.x": 0}']):
        out = tmp_path / "out"
        arguments = toy_run(out, world / "data", "--stage", 1, *weights, *flags)
        assert faulty_train.main({}, arguments) == 2
        assert not out.exists()
    error = capsys.readouterr().err
    assert "num_classes is 7" in error and "no module 'segmentor.encoder.x'" in error


def test_own_files_are_found_from_the_current_folder(world, tmp_path, monkeypatch):
    folder = world / "data/img_genseg/coco2017"
    monkeypatch.chdir(folder)
    name = "annotations/instances_val2017.json:val2017"
    dataset = open_dataset(name, tmp_path / "elsewhere")
    assert len(dataset) and dataset.inputs(0).image.width
    monkeypatch.chdir(tmp_path)  # and from the data root where there is none
    assert len(open_dataset(name, folder)) == len(dataset)
    flags = toy_run(tmp_path / "out", tmp_path, "--stage", 1, "--datasets", "mine.json")
    flags += ["--eval_tasks", "none"]
    (tmp_path / "mine.json").write_text("{}")
    assert "mine.json" not in preflight(*parse(flags))


def test_the_images_of_an_own_file_lie_where_it_does(tmp_path, monkeypatch):
    """A folder of the same name in the current one is none of its."""
    for root, level in ((tmp_path / "data", 200), (tmp_path / "here", 10)):
        (root / "images").mkdir(parents=True)
        Image.new("RGB", (8, 6), (level,) * 3).save(root / "images/a.png")
    records = [{"image": "a.png", "masks": [[[0, 0, 4, 0, 4, 4]]], "texts": ["it"]}]
    (tmp_path / "data/mine.json").write_text(json.dumps(records))
    monkeypatch.chdir(tmp_path / "here")
    sample = open_dataset("mine.json:images", tmp_path / "data").inputs(0)
    assert sample.image.getpixel((0, 0))[0] == 200


def test_an_own_file_is_never_made_and_is_looked_into_before_the_start(world, tmp_path, capsys):
    refs = tmp_path / "refs.json"
    refs.write_text("[]")
    flags = ["--stage", 1, "--eval_tasks", "none", "--weights", world / "weights"]
    arguments = toy_run(tmp_path / "out", world / "data", *flags, "--datasets", refs)
    assert faulty_train.main({}, arguments) == 2
    assert "generic sets alone" in capsys.readouterr().err
    arguments = ["--config", "toy", *map(str, flags), "--out", str(tmp_path / "out")]
    assert "absent.json\n" in preflight(*parse([*arguments, "--datasets", "absent.json"]))
    assert not (tmp_path / "out").exists()


# ---- stage 1, and what a stage starts from -------------------------------------------------------


def test_stage_1_alone_is_scored_before_and_after(world, tmp_path, capsys):
    weights = ["--weights", world / "weights", "--eval_tasks", "semantic,refer"]
    assert faulty_train.main({}, toy_run(tmp_path, world / "data", "--stage", 1, *weights)) == 0
    results = json.loads((tmp_path / "results.json").read_text())["columns"]
    assert [list(row) for row in results.values()] == [["semantic"]] * 2
    assert list(results) == ["untrained", "stage 1"]
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if line.startswith("  segmentor.decoder")]
    words = "segmentor.decoder 0.17 M learning rate 0.001 from nothing"
    assert " ".join(line.split()) == words
    assert "scored on: semantic\n" in printed


@pytest.mark.parametrize(
    ("flags", "wrong"),
    [
        (["--stage", 3, "--init", "stage2"], "random segmentor.connector, segmentor.pixel_decoder"),
        (["--stage", 3, "--init", "stage1"], None),  # paper table 8, row "S1, S3"
        (["--stage", 3, "--starts_from="], None),  # row "S3"
        (["--stage", 3, "--init", "stage2", "--starts_from="], None),
        (["--stage", 3, "--init", "stage2", "--init", "stage1"], None),
        (["--stage", 2, "--init", "stage2"], None),
        (["--stage", 2, "--init", "stage2", "--datasets", "refcoco"], "random segmentor.connector"),
        (["--stage", "all", "--init", "."], None),  # its segmentor is taken out
        (["--stage", 1, "--init", "stage2"], "--init holds image_projector, seg_projector"),
        (["--stage", 3, "--init", "stage1", "--init", "."], "name it alone, or first"),
        (["--stage", 3, "--init", "."], None),
    ],
)
def test_no_part_is_random_that_the_stage_does_not_train_so(run_folder, flags, wrong, capsys):
    paths = {name: run_folder / name for name in ("stage1", "stage2", ".")}
    flags = [paths.get(flag, flag) for flag in flags]
    if wrong is None:
        options, _ = parse(["--config", "toy", *map(str, flags)])
        assert options.brought or "--init" not in flags
    else:
        assert wrong in refusal(["--config", "toy", *flags], capsys)


def test_a_whole_model_needs_no_other_folder(run_folder, world, tmp_path, capsys):
    """Its architecture counts, also under another preset; a flag changes it."""
    flags = ["--config", "xsam", "--stage", "3", "--init", str(run_folder / "stage3")]
    config = parse([*flags, "--num_queries", "9"])[1]
    architecture = toy().resolve(num_queries=9).model
    assert config.model.seg_dim == architecture.seg_dim and config.model.num_queries == 9
    assert config.stages[3].datasets == xsam().stages[3].datasets
    flags = ["--stage", 3, "--init", run_folder, "--eval_tasks", "interactive"]
    flags += ["--datasets", "coco_interactive", "--max_new_tokens", 2]
    assert faulty_train.main({}, toy_run(tmp_path, world / "data", *flags)) == 0
    assert not (tmp_path / "world").exists()
    assert json.loads((tmp_path / "config.json").read_text())["init"] == [str(run_folder)]
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["columns"]) == ["init", "stage 3"]
    printed = capsys.readouterr().out
    assert "from nothing" not in printed and f"loaded {run_folder / 'stage3/step_12'}" in printed


def test_a_checkpoint_without_its_config_says_so(run_folder, tmp_path):
    folder = shutil.copytree(run_folder / "stage3/step_12", tmp_path / "copy")
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"copy: its embeddings are .* config\.json is missing"):
        load_checkpoint(folder)


def test_a_path_of_init_that_is_not_there_is_listed(tmp_path, world):
    flags = toy_run(tmp_path, world / "data", "--stage", 3, "--init", tmp_path / "none")
    assert f"  {tmp_path / 'none'}\n" in preflight(*parse(flags))


# ---- a run's folder ------------------------------------------------------------------------------


def test_a_runs_folder_stands_for_its_last_stage(run_folder, tmp_path):
    assert find_checkpoint(run_folder) == run_folder / "stage3/step_12"
    assert find_checkpoint(run_folder / "stage1") == run_folder / "stage1/step_3"
    (run_folder / "stage3").rename(tmp_path / "away")
    (run_folder / "stage3").mkdir()  # a stage that was not saved yet
    assert find_checkpoint(run_folder) == run_folder / "stage2/step_3"
    (run_folder / "stage3").rmdir()
    (tmp_path / "away").rename(run_folder / "stage3")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--tasks pope --tasks mme", "--tasks is given more than once"),
        ("--tasks pope --panoptic-rule published", "--panoptic-rule is for the sets of openvocab"),
        (
            "--tasks pope --presence 0.5",
            "--presence is for the sets of grefer and reason and refer",
        ),
        ("--tasks refer --presence 1.5", "1.5 is not from 0 to 1"),
        ("--tasks pope --one-crowd-per-class", "--one-crowd-per-class is for the sets of"),
        ("--tasks pope --names a,b", "--names is for the sets of openvocab"),
    ],
)
def test_evaluation_takes_no_flag_that_it_would_not_look_at(
    run_folder, world, flags, message, capsys
):
    flags = ["--checkpoint", run_folder, "--data", world / "data", *flags.split()]
    with pytest.raises(SystemExit):
        evaluate_command.parse_options(list(map(str, flags)))
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("out", ["a file", "results of training"])
def test_evaluation_looks_at_out_before_it_predicts(run_folder, world, tmp_path, out, capsys):
    path = tmp_path / "results.json"
    path.write_text("{}")
    flags = ["--checkpoint", run_folder, "--data", world / "data", "--tasks", "pope", "--out"]
    flags.append(path if out == "a file" else tmp_path)
    with pytest.raises(SystemExit):
        evaluate_command.parse_options(list(map(str, flags)))
    error = capsys.readouterr().err
    assert ("is a file" if out == "a file" else "is not of this command") in error
    options = evaluate_command.parse_options(list(map(str, flags[:-2])))
    assert options.out == options.checkpoint == run_folder / "stage3"
