"""What the tests share: one small toy world, its weights, and a model of each kind.

The models are made once for the whole run: a test that changes one works on a copy.
"""

import copy
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from xsam.config import Config
from xsam.data import Processor
from xsam.datasets.registry import open_dataset
from xsam.model import XSAM, Segmentor
from xsam.toy import weights as toy
from xsam.toy.preset import toy as toy_config
from xsam.toy.world import write_world
from xsam.train import pretrained_model

torch.set_num_threads(1)

LONGEST = ("test_faults", "test_train", "test_evaluate", "test_plan")  # files, of minutes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: with two workers, what is begun last should be short."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A folder with `data` and `weights`."""
    path = tmp_path_factory.mktemp("world")
    write_world(path / "data", num_train=24, num_val=6)
    toy.write_weights(path / "weights", toy_config().model, steps=3)
    return path


@pytest.fixture
def config() -> Config:
    return toy_config()


def _settings(world: Path) -> Config:
    """The toy preset as training leaves it, with short answers and without a least presence."""
    categories = open_dataset("coco_panoptic", world / "data").categories
    return toy_config().resolve(categories=categories, max_new_tokens=4, presence=0.0)


@pytest.fixture(scope="session")
def model(world) -> XSAM:
    torch.manual_seed(0)
    return pretrained_model(3, _settings(world), world / "weights").eval()


@pytest.fixture(scope="session")
def segmentor(world) -> Segmentor:
    torch.manual_seed(0)
    return pretrained_model(1, _settings(world), world / "weights").eval()


@pytest.fixture
def tokenizer(model) -> PreTrainedTokenizerBase:
    return copy.deepcopy(model.tokenizer)


@pytest.fixture
def processor(config, model) -> Processor:
    return Processor(config, model.tokenizer)


SPOKEN = (
    "coco_panoptic_val",
    "refcoco_val",
    "reasonseg_val",
    "coco_vgd_val_point",
    "gcg_val",
    "pope",
)


@pytest.fixture(scope="session")
def speaking_model(model, world) -> XSAM:
    """A copy of `model` whose answer to every question is "<SEG>", and whose panoptic masks are not
    all background or below a threshold.

    The row of its output head that is <SEG>'s points at the states that end a prompt.
    """
    speaking = copy.deepcopy(model)
    settings = dict(score_threshold=0.0, overlap_threshold=0.0, max_new_tokens=1)
    speaking.config = speaking.config.resolve(**settings)
    reader = Processor(toy_config(), model.tokenizer)
    queries, states = [], []
    head = speaking.segmentor.class_head
    hook = head.register_forward_hook(lambda _, inputs, __: queries.append(inputs[0][-1]))
    for name in SPOKEN:
        dataset = open_dataset(name, world / "data", all_classes=True)
        samples = [dataset.inputs(index % len(dataset)) for index in range(6)]
        batch = reader.collate([reader.encode(sample) for sample in samples], pad_left=True)
        with torch.no_grad():
            embeddings, hidden_states = speaking.encode(batch)
            nothing = torch.zeros(6, 1, speaking.config.model.decoder_dim)
            index = torch.arange(6)
            speaking.segmentor.decode(hidden_states, index, None, nothing, nothing[..., 0] > 0)
            states.append(speaking.llm(embeddings, batch.attention_mask)[:, -1])
    hook.remove()
    with torch.no_grad():
        speaking.background_embedding.weight[0] = -torch.cat(queries).mean(dim=(0, 1))
        head = speaking.llm.model.get_output_embeddings().weight
        head[model.llm.special_ids[0]] = 1e3 * torch.cat(states).mean(dim=0)
    return speaking
