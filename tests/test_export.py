"""An exported folder is the checkpoint bit for bit and has the names and shapes that the published
code loads; its card has no figure that is not on the disk.

pytest tests/test_export.py
"""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_weights import published, same, snapshot
from torch import Tensor, nn
from transformers import Phi3Config, Phi3ForCausalLM

from xsam.checkpoints import save_checkpoint
from xsam.config import stage_folder, xsam
from xsam.evaluate import FOLDER
from xsam.evaluation.benchmarks import SEGMENTOR_PAPER, scored_tasks
from xsam.export import main, model_card, read_record
from xsam.inference import load_checkpoint, save_pretrained
from xsam.model import XSAM, Segmentor
from xsam.weights import (
    BIN_FILE,
    CONFIG_FILE,
    EMBEDDING,
    MODEL_FILE,
    OUTPUT,
    own_tensors,
    save_bin,
    weights_digest,
)

FIGURES = {"panoptic": {"PQ": 61.27, "SQ": 0.04}, "refer": {"cIoU": 12.345, "gIoU testA": None}}


def save(model: XSAM | Segmentor, run: Path, step: int = 7) -> Path:
    """A checkpoint of the model in a run's folder."""
    folder, stage = stage_folder(run, model.stage), model.stage
    return save_checkpoint(folder, model, model.config, model.tokenizer, stage, step, {})


def quiet(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def trained(model, segmentor, tmp_path_factory) -> Path:
    """A run's folder as training leaves it."""
    run = tmp_path_factory.mktemp("run")
    save(segmentor, run, 5)
    save(model, run)
    columns = {"untrained": {"panoptic": {"PQ": 99.9}}, "stage 3": FIGURES}
    (run / "results.json").write_text(json.dumps(FIGURES | {"columns": columns}))
    return run


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "mine"
    assert main([str(trained), "--out", str(folder), "--license", "apache-2.0"]) == 0
    return folder


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def figures_of(card: str) -> dict[str, dict[str, str]]:
    """What stands in the rows of the card's table of results."""
    found = {}
    section = card.split("## Results")[1].split("##")[0]
    for task, name, figure in re.findall(r"^\| (\w+) \| ([^|]+) \| ([\d.]+|–) \|", section, re.M):
        found.setdefault(task, {})[name] = figure
    return found


def written(figures: dict) -> dict[str, dict[str, str]]:
    return {
        task: {name: "–" if x is None else f"{x:.1f}" for name, x in row.items()}
        for task, row in figures.items()
    }


# ---- the folder ----------------------------------------------------------------------------------


def test_the_folder_is_the_checkpoint_bit_for_bit(exported, model):
    loaded = XSAM.from_pretrained(exported, report=quiet)
    assert same(snapshot(loaded), snapshot(model)) and loaded.config == model.config
    assert loaded.tokenizer.get_vocab() == model.tokenizer.get_vocab()


def test_a_type_is_that_of_the_weights_and_told(trained, model, tmp_path):
    assert main([str(trained), "--out", str(tmp_path / "x"), "--dtype", "bfloat16"]) == 0
    loaded = XSAM.from_pretrained(tmp_path / "x", report=quiet)
    expected = {name: x.detach().bfloat16() for name, x in model.named_parameters()}
    assert same(dict(loaded.named_parameters()), expected)
    card = (tmp_path / "x/README.md").read_text()
    assert "parameters (bfloat16)" in card and "before the weights were cast to bfloat16" in card
    assert figures_of(card) == written(FIGURES)


def test_a_folder_is_not_written_over(exported, trained, capsys):
    before = (exported / "README.md").read_text()
    assert main([str(trained), "--out", str(exported)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert (exported / "README.md").read_text() == before


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--private"], "--private is of --push"),
        (["--license", "all: mine"], "license 'all: mine': not a name"),
        (["--push", "mine"], "'mine': a repository of the hub is named OWNER/NAME"),
    ],
)
def test_wrong_flags_are_told_and_nothing_is_written(trained, tmp_path, capsys, flags, expected):
    assert main([str(trained), "--out", str(tmp_path / "x"), *flags]) == 2
    assert expected in capsys.readouterr().err and not (tmp_path / "x").exists()


# ---- the published code --------------------------------------------------------------------------


def theirs(model: XSAM | Segmentor) -> dict[str, Tensor]:
    """The state dict that the published code's model has of this architecture, without the two of
    its tensors that no mask and no word depends on. Its tables of words are as long as the
    tokenizer."""
    state = published(model, "current")
    state = {x: y for x, y in state.items() if "criterion" not in x and "shared_image" not in x}
    for name in state.keys() & {EMBEDDING, OUTPUT}:
        state[name] = state[name][: len(model.tokenizer)]
    return state


@pytest.mark.parametrize("kind", ["segmentor", "model"])
@pytest.mark.parametrize("layout", ["one file", "several files", "bin"])
def test_names_are_those_of_the_published_state_dict(request, kind, layout, tmp_path):
    model = request.getfixturevalue(kind)
    limit = 10**5 if layout == "several files" else 10**9
    save_pretrained(model, tmp_path / "x", max_shard_bytes=limit, is_bin=layout == "bin")
    files = sorted((tmp_path / "x").glob("*.safetensors"))
    states = [load_file(file) for file in files]
    assert (len(files) > 1) == (layout == "several files")
    if layout == "bin":
        states = [torch.load(tmp_path / "x" / BIN_FILE, weights_only=True)]
        shapes = {name: tensor.shape for name, tensor in states[0].items()}
        assert not files and shapes == {name: x.shape for name, x in theirs(model).items()}
    names = [name for state in states for name in state]
    assert len(names) == len(set(names)) and set(names) == theirs(model).keys()


@pytest.mark.parametrize("kind", ["segmentor", "model"])
def test_a_bin_comes_back_bit_for_bit(request, kind, tmp_path):
    """But for the rows of the tables of words that no token has."""
    model = request.getfixturevalue(kind)
    save_pretrained(model, tmp_path / "x", is_bin=True)
    loaded, stage = load_checkpoint(tmp_path / "x", report=quiet)
    assert stage == model.stage and not (tmp_path / "x" / MODEL_FILE).exists()
    expected = snapshot(model)
    for name, value in snapshot(loaded).items():
        assert torch.equal(value, expected.pop(name)[: len(value)])
        is_words = name.startswith("llm.") and name.endswith(("embed_tokens.weight", "head.weight"))
        assert is_words or value.shape == model.state_dict()[name].shape
    assert not expected
    if stage == 3:
        rows = loaded.llm.model.get_input_embeddings().num_embeddings
        assert rows == len(model.tokenizer) < model.llm.model.get_input_embeddings().num_embeddings


def test_a_bin_fills_a_language_model_made_as_the_published_code_makes_it(model, tmp_path):
    """That code passes over a table of another length, with no more than a warning."""
    save_pretrained(model, tmp_path / "x", is_bin=True)
    state = torch.load(tmp_path / "x" / BIN_FILE, weights_only=True)
    config = model.config.model.llm_config
    reference = Phi3ForCausalLM(
        Phi3Config(**{x: y for x, y in config.items() if x != "model_type"})
    )
    reference.resize_token_embeddings(len(model.tokenizer))
    inside = {x.removeprefix("llm."): y for x, y in state.items() if x.startswith("llm.")}
    reference.load_state_dict(inside, strict=True)


def test_tied_tables_have_both_names_in_a_bin(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.llm = nn.Module()
            self.llm.model = nn.Module()
            self.llm.model.model = nn.Module()
            self.llm.model.model.embed_tokens = nn.Embedding(9, 2)
            self.llm.model.lm_head = nn.Linear(2, 9, bias=False)
            self.llm.model.lm_head.weight = self.llm.model.model.embed_tokens.weight

    tied = Tied()
    assert len(own_tensors(tied)) == 1
    save_bin(tmp_path, tied, num_words=4)
    state = torch.load(tmp_path / BIN_FILE, weights_only=True)
    assert state.keys() == {EMBEDDING, OUTPUT} and torch.equal(state[EMBEDDING], state[OUTPUT])
    assert state[OUTPUT].shape == (4, 2) and state[OUTPUT].untyped_storage().nbytes() == 32


# ---- the card ------------------------------------------------------------------------------------


def test_the_card_says_what_the_model_is(exported, model):
    card = (exported / "README.md").read_text()
    front = front_matter(card)
    assert front["library_name"] == "xsam" and front["license"] == "apache-2.0"
    assert front["pipeline_tag"] == "image-segmentation" and "base_model" not in front
    assert "No license" not in card and 'from_pretrained("mine")' in card
    total = sum(parameter.numel() for parameter in model.parameters())
    assert f"| all | {total:,} |" in card
    counts = re.findall(r"^\| ([\w.]+) \| ([\d,]+) \|$", card, re.M)
    assert sum(int(count.replace(",", "")) for _, count in counts) == 2 * total
    assert f"\n{len(model.config.categories)} that it was trained on (" in card
    assert all(each["name"] in card for each in model.config.categories[:20])


def test_what_the_card_tells_to_run_runs(exported, tmp_path, world, monkeypatch, capsys):
    from xsam import predict

    card = (exported / "README.md").read_text()
    image = next((world / "data").rglob("*.jpg"))
    (tmp_path / "photo.jpg").write_bytes(image.read_bytes())
    (tmp_path / "mine").symlink_to(exported)
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?)```", card, re.S)[1], {})
    assert (tmp_path / "found.png").is_file()
    phrase = re.search(r'xsam\.predict refer "(.*?)" --checkpoint mine --image photo\.jpg', card)[1]
    assert predict.main(["refer", phrase, "--checkpoint", "mine", "--image", "photo.jpg"]) == 0


def test_figures_are_those_of_results_json(exported):
    card = (exported / "README.md").read_text()
    assert figures_of(card) == written(FIGURES) and "99.9" not in card


def test_no_figure_of_the_paper_is_in_a_card(model, segmentor, exported):
    cards = [(exported / "README.md").read_text(), model_card(segmentor, "x")]
    cards.append(model_card(model, "x"))
    papers = [task.paper for task in scored_tasks().values()] + list(SEGMENTOR_PAPER.values())
    known = {str(figure) for paper in papers for figure in paper.values()}
    for card in cards:
        assert not known & set(re.findall(r"\d+\.\d+", card)) and "| paper |" not in card
    assert all("\nNone: no results.json" in card for card in cards[1:])


def test_the_recipe_is_that_of_the_headers(trained, exported, model, tmp_path):
    card = (exported / "README.md").read_text()
    stages = model.config.stages
    assert (
        f"| 1 | its parts' own weights | coco_panoptic | 5 | {stages[1].global_batch_size} |"
        in card
    )
    row = re.search(r"^\| 3 \| stage 1, stage 2 \| (.*?) \| 7 \| (\d+) \| (.*) \|$", card, re.M)
    assert row[1].split(", ") == list(stages[3].datasets)
    assert int(row[2]) == stages[3].global_batch_size
    assert dict(each.split() for each in row[3].split(", ")) == {
        part or "others": f"{rate}" for part, rate in stages[3].learning_rates.items()
    }
    assert "The settings of stage 2 are not known here" in card
    assert "The settings of stage 1 are" not in card
    assert f"seed {model.config.seed}, trained in {model.config.dtype}" in card
    assert "How it was trained is not known" in model_card(model, "x")


def test_folders_of_the_machine_are_not_told(model, tmp_path):
    config = model.config.resolve([3], datasets=("/home/me/a.json:/home/me/b", "refcoco"))
    config = config.resolve([3], starts_from=()).resolve(init=("/home/me/runs/old",))
    header = {"stage": 3, "step": 0, "config": config}
    card = model_card(model, "x", headers=[header])
    assert "| 3 | old | a.json:b, refcoco | – |" in card and "/home" not in card


def test_results_of_other_weights_are_not_taken(model, tmp_path):
    """A column is of the stage's newest checkpoint, and of the weights whose predictions lie
    there."""
    old, new = save(model, tmp_path, 3), save(model, tmp_path, 4)
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"columns": {"stage 3": FIGURES}}))
    assert not read_record(old, model)["results"] and read_record(new, model)["results"]
    assert len(read_record(tmp_path, model)["headers"]) == 1
    about = tmp_path / FOLDER / "stage3/refcoco_val/about.json"
    about.parent.mkdir(parents=True)
    for weights, is_taken in (("other", False), (weights_digest(model), True)):
        about.write_text(json.dumps({"keys": [], "made_by": {"weights": weights}}))
        assert bool(read_record(new, model)["results"]) == is_taken
    results.write_text(json.dumps({"columns": {"stage 1": FIGURES}}))
    assert not read_record(new, model)["results"]
    for wrong in ({"about": []}, {"columns": {"stage 3": {"tennis": {"PQ": 1.0}}}}):
        results.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=r"results\.json: no results of this library.*move it"):
            read_record(new, model)


def test_results_of_evaluate_are_taken_for_its_weights_alone(model, tmp_path):
    checkpoint = save(model, tmp_path)
    about = {"column": "stage 3", "weights": weights_digest(model), "first_samples": 8, "sets": {}}
    path = checkpoint.parent / "results.json"
    path.write_text(json.dumps(FIGURES | {"about": about}))
    card = model_card(model, "x", **read_record(checkpoint, model))
    assert figures_of(card) == written(FIGURES) and "The first 8 samples of each set alone." in card
    path.write_text(json.dumps(FIGURES | {"about": about | {"weights": "0"}}))
    assert not read_record(checkpoint, model)["results"]


def test_public_parts_are_named_as_the_hub_does(model):
    saved = SimpleNamespace(
        config=xsam().resolve(presence=0.0), stage=3, prefix="", named_parameters=list,
        parameters=list,
    )  # fmt: skip
    card = model_card(saved, "me/x", license="mit")
    assert front_matter(card)["base_model"] == [
        *("facebook/sam-vit-large", "google/siglip2-so400m-patch14-384"),
        "microsoft/Phi-3-mini-4k-instruct",
    ]
    assert "\n# x\n" in card and 'from_pretrained("me/x")' in card
    assert "It brings no list of classes" in card and "Every phrase gets a mask" in card


def test_many_classes_are_counted(segmentor):
    names = [f"thing {n}" for n in range(25)]
    categories = tuple({"name": name, "is_thing": name != "thing 3"} for name in names)
    saved = SimpleNamespace(config=segmentor.config.resolve(categories=categories), stage=1)
    saved.prefix, saved.named_parameters, saved.parameters = "", list, list
    card = model_card(saved, "x")
    assert "\n25 that it was trained on (24 things, 1 stuff): thing 0, " in card
    assert "thing 19, and 5 more." in card and "thing 20" not in card
    assert "xsam.predict panoptic --checkpoint x" in card


# ---- the hub -------------------------------------------------------------------------------------


class Hub:
    """Stands in for the hub: notes what would be uploaded, and fails as it is told."""

    def __init__(self, monkeypatch, error: Exception | None = None, is_public: bool = False):
        self.calls, self.files, self.error, self.is_public = [], {}, error, is_public
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")

    def create_repo(self, name: str, **options) -> str:
        self.calls.append((name, options))
        if self.error is not None:
            raise self.error
        return f"https://huggingface.co/{name}"

    def repo_info(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(private=not self.is_public)

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
        assert repo_id == self.calls[-1][0] and commit_message
        self.files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}


def test_the_folder_is_what_is_uploaded(trained, exported, tmp_path, monkeypatch, capsys):
    hub = Hub(monkeypatch)
    arguments = [str(trained), "--out", str(tmp_path / "x"), "--push", "me/toy", "--private"]
    assert main([*arguments, "--license", "apache-2.0"]) == 0
    assert hub.calls == [("me/toy", {"private": True, "exist_ok": True})]
    assert capsys.readouterr().out.endswith("https://huggingface.co/me/toy\n")
    assert hub.files.keys() == {path.name for path in exported.iterdir()}
    for name in hub.files.keys() - {"README.md"}:
        assert hub.files[name] == (exported / name).read_bytes()
    assert {MODEL_FILE, CONFIG_FILE, "README.md", "tokenizer.json"} <= hub.files.keys()
    assert b'from_pretrained("me/toy")' in hub.files["README.md"]


def test_a_model_in_memory_is_uploaded(model, trained, monkeypatch):
    hub = Hub(monkeypatch)
    assert model.push_to_hub("me/toy") == "https://huggingface.co/me/toy"
    assert hub.calls == [("me/toy", {"private": None, "exist_ok": True})]
    assert b"How it was trained is not known here" in hub.files["README.md"]
    model.push_to_hub("me/toy", checkpoint=trained, license="mit")
    card = hub.files["README.md"].decode()
    assert figures_of(card) == written(FIGURES) and front_matter(card)["license"] == "mit"


def http_error(status: int) -> Exception:
    error = huggingface_hub.errors.HfHubHTTPError.__new__(huggingface_hub.errors.HfHubHTTPError)
    error.response = SimpleNamespace(status_code=status)
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (http_error(403), "me/toy: not uploaded: the token may not write there"),
        (http_error(401), "me/toy: not uploaded: the token may not write there"),
        (ConnectionError("Name or service not known\nmore"), "me/toy: not uploaded: Name or serv"),
        (KeyError(), "me/toy: not uploaded: KeyError"),
    ],
)
def test_what_cannot_be_uploaded_is_told_in_a_line(
    trained, tmp_path, monkeypatch, capsys, error, expected
):
    """And the folder stays, to be sent later."""
    Hub(monkeypatch, error)
    assert main([str(trained), "--out", str(tmp_path / "x"), "--push", "me/toy"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"xsam.export: {expected}")
    assert said.endswith(f"{tmp_path / 'x'} is whole: hf upload me/toy {tmp_path / 'x'}")
    assert XSAM.from_pretrained(tmp_path / "x", report=quiet)


def test_what_is_to_be_private_is_not_put_where_all_see_it(model, monkeypatch):
    hub = Hub(monkeypatch, is_public=True)
    with pytest.raises(ValueError, match="me/toy: not uploaded: it is there and public"):
        model.push_to_hub("me/toy", private=True)
    assert not hub.files


def test_without_a_token_nothing_is_written(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert main([str(trained), "--out", str(tmp_path / "x"), "--push", "me/toy"]) == 2
    assert "me/toy: no token of the hub; run `hf auth login`" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
