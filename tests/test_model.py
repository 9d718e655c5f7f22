"""The joined model: sizes, gradients, a batch against its samples alone, and masks read out.

pytest tests/test_model.py
"""

import copy
import dataclasses
import functools

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import nn

from xsam.config import Config, xsam
from xsam.connector import pixel_shuffle
from xsam.data import Batch, Processor, Sample
from xsam.datasets.registry import open_dataset
from xsam.inference import (
    build_inputs,
    encode_image,
    predict,
    predict_inputs,
    quantize,
)
from xsam.llm import IMAGE_TOKEN, REGION_TOKEN, find_runs
from xsam.losses import Normalisers, Objective
from xsam.model import XSAM, Segmentor, checkpoint_activations, compile_blocks
from xsam.regions import draw_region
from xsam.results import SegmentationResult
from xsam.tasks import requests
from xsam.train import pretrained_model

DATASETS = {
    "generic": "coco_panoptic",
    "refer": "refcoco",
    "reason": "reasonseg",
    "gcg": "gcg_grandf",
    "interactive": "coco_interactive",
    "vgd": "coco_vgd",
    "chat": "llava_instruct",
}
ASKED = {"panoptic": "coco_panoptic_val", "refer": "refcoco_val"}


def training_samples(world, task: str, count: int = 3) -> list[Sample]:
    dataset = open_dataset(DATASETS[task], world / "data")
    return [dataset.sample(index, np.random.default_rng(index)) for index in range(count)]


def training_batch(processor: Processor, samples: list[Sample]) -> Batch:
    return processor.collate([processor.encode(sample, run_seed=7) for sample in samples])


def questions(world, task: str, count: int = 6) -> list[Sample]:
    dataset = open_dataset(ASKED[task], world / "data", all_classes=True)
    return [dataset.inputs(index) for index in range(count)]


def respond(model: XSAM | Segmentor, samples: list[Sample]) -> list[SegmentationResult]:
    reading = {"generic": "panoptic", "chat": "none"}.get(samples[0].task, "phrases")
    processor = Processor(model.config, model.tokenizer)
    return predict_inputs(model, build_inputs(processor, samples), reading, is_thing(model))


def is_thing(model: XSAM | Segmentor) -> list[bool]:
    return [category["is_thing"] for category in model.config.categories]


# ---- sizes ---------------------------------------------------------------------------------------


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_full_preset_has_the_papers_sizes():
    expected = {
        "segmentor.encoder": 308_278_272,
        "segmentor.connector": 10_499_072,
        "segmentor.pixel_decoder": 6_101_440,
        "segmentor.decoder": 14_509_824,
        "segmentor.class_head": 1,  # the logit scale
        "image_encoder": 428_225_600,
        "llm": 3_821_079_552,
        "image_projector": 12_982_272,
        "seg_projector": 22_026_240,
        "llm_projector": 852_480,
        "background_embedding": 256,
    }
    with torch.device("meta"):
        model = XSAM(xsam())
    assert {name: num_parameters(model.get_submodule(name)) for name in expected} == expected
    assert num_parameters(model) == sum(expected.values())


def test_the_full_segmentor_has_a_head_for_coco():
    with torch.device("meta"):
        segmentor = Segmentor(xsam())
    assert segmentor.class_head.predictor.weight.shape == (133 + 1, 256)
    parts = num_parameters(segmentor) - num_parameters(segmentor.class_head)
    assert parts == 308_278_272 + 10_499_072 + 6_101_440 + 14_509_824


@torch.no_grad()
def test_visual_tokens_are_the_image_encoders_then_the_segmentation_encoders(
    model, processor, world
):
    batch = training_batch(processor, training_samples(world, "chat", 1))
    embeddings, hidden_states = model.encode(batch)
    tokens = embeddings[batch.input_ids == IMAGE_TOKEN]
    own = model.image_projector(model.image_encoder(batch.image_pixels))[0]
    count = len(own)
    assert torch.allclose(tokens[:count], own, atol=1e-5)
    seg_tokens = model.seg_projector(pixel_shuffle(hidden_states[-2], 0.5)).flatten(0, 2)
    assert torch.allclose(tokens[count:], seg_tokens, atol=1e-5)
    assert len(tokens) == processor.num_visual_tokens
    assert len(hidden_states) == 1 + model.config.model.seg_depth
    assert Processor(xsam(), None).num_visual_tokens == 27 * 27 + 32 * 32


def test_a_text_without_an_image_shows_none(model, processor, world):
    """Its words are all that the language model reads; both projectors get a gradient of zero, as
    every rank must have one."""
    samples = training_samples(world, "chat", 2)
    texts = [dataclasses.replace(sample, is_text=True) for sample in samples]
    batch, shown = training_batch(processor, texts), training_batch(processor, samples)
    assert not (batch.input_ids == IMAGE_TOKEN).any()
    fewer = processor.num_visual_tokens + len(processor.tokenizer.encode("\n"))
    assert batch.input_ids.shape[1] == shown.input_ids.shape[1] - fewer
    mixed = training_batch(processor, [texts[0], samples[1]])
    loss = model(batch).token_loss
    loss.backward()
    for name in ("image_projector", "seg_projector"):
        assert all((p.grad == 0).all() for p in model.get_submodule(name).parameters())
    assert any(p.grad.any() for p in model.llm.parameters())
    model.zero_grad()
    with torch.no_grad():
        batch.seg_pixels, batch.image_pixels = shown.seg_pixels, shown.image_pixels
        assert torch.equal(model(batch).token_loss, loss)  # whatever the picture
        alone = [model(training_batch(processor, [s])).token_loss for s in (texts[0], samples[1])]
        assert torch.allclose(model(mixed).token_loss, sum(alone), rtol=1e-5)


@torch.no_grad()
def test_conditions_and_seg_state_are_read_from_the_language_models_states(
    model, processor, world, monkeypatch
):
    """SPEC 3: the mean from <p> to </p>, both included, background last; <SEG> goes to queries."""
    batch = training_batch(processor, training_samples(world, "generic", 1))
    seen = {}
    spoken, decode = model.segmentor.class_head.forward, model.segmentor.decode
    monkeypatch.setattr(
        model.segmentor.class_head,
        "forward",
        lambda queries, *rest: seen.update(conditions=rest[0]) or spoken(queries, *rest),
    )
    monkeypatch.setattr(
        model.segmentor,
        "decode",
        lambda *inputs: seen.update(image_index=inputs[1], seg=inputs[2]) or decode(*inputs),
    )
    model(batch)

    embeddings, _ = model.encode(batch)
    states = model.llm(embeddings, batch.attention_mask)[0]
    projected, ids = model.llm_projector(states), batch.input_ids[0].tolist()
    seg, phrase_start, phrase_end = model.llm.special_ids
    opens = [place for place, token in enumerate(ids) if token == phrase_start]
    closes = [place for place, token in enumerate(ids) if token == phrase_end]
    expected = [projected[a : b + 1].mean(0) for a, b in zip(opens, closes, strict=True)]
    expected.append(model.background_embedding.weight[0])
    assert torch.allclose(seen["conditions"][0], torch.stack(expected), atol=1e-4)
    assert torch.allclose(seen["seg"][0], projected[ids.index(seg)], atol=1e-4)
    assert seen["image_index"].tolist() == [0]


# ---- a batch and its samples ---------------------------------------------------------------------


@torch.no_grad()
def test_a_batch_is_its_samples_alone_in_the_generic_task(model, processor, world):
    samples = training_samples(world, "generic")
    assert len({len(sample.names) for sample in samples}) > 1  # so that classes are padded
    together = model(training_batch(processor, samples))
    masks, token_losses = together.predictions.mask_logits(), 0.0
    for row, sample in enumerate(samples):
        alone = model(training_batch(processor, [sample]))
        count = len(sample.names)
        logits = together.predictions.class_logits[:, row]
        padding = logits[..., count:-1]
        assert (padding == -1e4).all()
        kept = torch.cat([logits[..., :count], logits[..., -1:]], dim=-1)
        assert torch.allclose(kept, alone.predictions.class_logits[:, 0], atol=1e-3)
        assert torch.allclose(masks[row], alone.predictions.mask_logits()[0], atol=1e-3)
        token_losses += alone.token_loss
    assert torch.allclose(together.token_loss, token_losses, rtol=1e-4)


@torch.no_grad()
def test_a_batch_is_its_images_alone_in_the_segmentor(segmentor, config, world):
    processor = Processor(config, None)
    samples = training_samples(world, "generic")
    together = segmentor(training_batch(processor, samples)).predictions
    for row, sample in enumerate(samples):
        alone = segmentor(training_batch(processor, [sample])).predictions
        assert torch.allclose(together.class_logits[:, row], alone.class_logits[:, 0], atol=1e-3)
        assert torch.allclose(together.mask_logits()[row], alone.mask_logits()[0], atol=1e-3)


@torch.no_grad()
def test_training_on_phrases_takes_those_of_the_whole_batch_as_classes(model, processor, world):
    samples = training_samples(world, "refer")
    batch = training_batch(processor, samples)
    model.train()
    together = model(batch).predictions
    model.eval()
    counts = [len(sample.names) for sample in samples]
    assert together.class_logits.shape[1:] == (sum(counts), 20, sum(counts) + 1)
    start = 0
    for sample, count in zip(samples, counts, strict=True):
        batch = training_batch(processor, [sample])
        batch.runs = find_runs(batch.input_ids, model.llm.special_ids, is_per_phrase=True)
        alone = model(batch).predictions
        own = torch.arange(start, start + count)
        logits = together.class_logits[:, own]
        # Each phrase alone against the background: its own column and the last.
        kept = torch.stack([logits[:, range(count), :, own], logits[..., -1].transpose(0, 1)])
        expected = alone.class_logits.permute(3, 1, 0, 2)
        assert torch.allclose(kept, expected, atol=1e-3)
        masks = together.mask_logits()[own]
        assert torch.allclose(masks, alone.mask_logits(), atol=1e-3)
        start += count


@pytest.mark.parametrize("task", ASKED)
def test_inference_on_a_batch_is_inference_one_by_one(speaking_model, world, task):
    samples = questions(world, task)
    together = respond(speaking_model, samples)
    assert any(len(prediction.masks) for prediction in together)
    for sample, prediction in zip(samples, together, strict=True):
        (alone,) = respond(speaking_model, [sample])
        assert prediction.answer == alone.answer == "<SEG>"
        assert prediction.labels == alone.labels
        assert prediction.scores == pytest.approx(alone.scores, abs=1e-3)
        assert prediction.masks.shape == alone.masks.shape
        assert (prediction.masks != alone.masks).mean() < 1e-3


def test_an_image_of_several_rows_is_encoded_once(speaking_model, world):
    first, *others = questions(world, "refer", 8)
    second = next(each for each in others if each.image_id != first.image_id)
    samples, sizes = [first, first, second, first], []
    segmentor = speaking_model.segmentor
    hooks = [
        part.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
        for part in (segmentor.encoder, speaking_model.image_encoder)
    ]
    try:
        together = respond(speaking_model, samples)
    finally:
        for hook in hooks:
            hook.remove()
    assert sizes == [3, 3]
    for sample, prediction in zip(samples, together, strict=True):
        (alone,) = respond(speaking_model, [sample])
        assert prediction.scores == pytest.approx(alone.scores, abs=1e-3)
        assert (prediction.masks != alone.masks).mean() < 1e-3
    assert together[0].masks.any() and (together[0].masks == together[1].masks).all()


@torch.no_grad()
def test_what_is_inferred_is_what_training_would_see_of_the_same_answer(
    speaking_model, processor, world
):
    """The states that come out of the cache are those of one pass over question and answer."""
    samples = questions(world, "refer", 3)
    encoded = [processor.encode(sample) for sample in samples]
    _, inferred = speaking_model.infer(processor.collate(encoded, pad_left=True), 4)
    for sample in samples:
        sample.turns = [(asked, "<SEG>") for asked, _ in sample.turns]
    batch = training_batch(processor, samples)
    ids = batch.input_ids, speaking_model.llm.special_ids
    batch.runs = find_runs(*ids, is_per_phrase=True)  # at inference no classes are shared
    seen = speaking_model(batch).predictions
    assert torch.allclose(inferred.class_logits, seen.class_logits, atol=1e-3)
    assert torch.allclose(inferred.mask_logits(), seen.mask_logits(), atol=1e-3)


# ---- gradients -----------------------------------------------------------------------------------


def without_gradient(model: nn.Module, batch: Batch, settings: Config) -> set[str]:
    """Names of the parameters that a training step leaves without any gradient."""
    model = copy.deepcopy(model).train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            # Some start at zero and so hold back the gradient of others.
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    losses = Objective(model, settings)(batch, Normalisers(1.0, 1.0, 1.0))
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    }


def names_under(model: nn.Module, *prefixes: str) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.startswith(prefixes)}


# Nothing reads SAM's neck, nor what comes after the image encoder's last hidden state but one.
UNREAD = (
    "segmentor.encoder.neck.",
    "image_encoder.model.encoder.layers.2.",
    "image_encoder.model.post_layernorm.",
    "image_encoder.model.head.",
)
# Chat reads the segmentation encoder up to its last hidden state but one, and nothing after it.
UNREAD_IN_CHAT = (
    "segmentor.encoder.layers.3.",
    "segmentor.connector.",
    "segmentor.pixel_decoder.",
    "segmentor.decoder.",
    "segmentor.class_head.",
    "llm_projector.",
    "background_embedding.",
)


@pytest.mark.parametrize(
    ("task", "unread"),
    [("generic", UNREAD), ("refer", UNREAD), ("chat", UNREAD + UNREAD_IN_CHAT)],
)
def test_every_parameter_that_is_read_gets_a_gradient(
    model, processor, config, world, task, unread
):
    batch = training_batch(processor, training_samples(world, task, 2))
    assert without_gradient(model, batch, config) == names_under(model, *unread)


def test_every_parameter_of_the_segmentor_gets_a_gradient(segmentor, config, world):
    batch = training_batch(Processor(config, None), training_samples(world, "generic", 2))
    assert without_gradient(segmentor, batch, config) == names_under(segmentor, "encoder.neck.")


@pytest.mark.parametrize("names", [[], ["red circle"]])
def test_a_batch_without_targets_trains(model, processor, config, world, names):
    """Even one whose prompt names no class at all."""
    samples = training_samples(world, "generic", 2)
    for sample in samples:
        sample.names = names
        phrases = ", ".join(f"<p>{name}</p>" for name in names)
        sample.turns = [(f"Segment {phrases}.", "Sure, <SEG>.")]
        sample.masks, sample.labels = sample.masks[:0], sample.labels[:0]
        sample.ignore = None
    unread = without_gradient(model, training_batch(processor, samples), config)
    assert not any(name.startswith("llm.") for name in unread)
    # Background alone leaves nothing to tell apart.
    assert ("segmentor.decoder.queries_features.weight" in unread) == (not names)


def test_a_batch_of_nothing_that_is_there_trains(model, processor, config, world):
    """gRefCOCO: the losses have the names of other ranks, the segmentor's gradient is zero."""
    (sample,) = training_samples(world, "refer", 1)
    sample.turns = [(asked, "There is no such thing.") for asked, _ in sample.turns]
    sample.masks, sample.labels = sample.masks[:0], sample.labels[:0]
    model = copy.deepcopy(model).train()
    batch = training_batch(processor, [sample])
    losses = Objective(model, config)(batch, Normalisers(1.0, 1.0, 1.0))
    assert {name for name, loss in losses.items() if loss == 0} == {"class", "mask", "dice"}
    assert losses["text"] > 0
    sum(losses.values()).backward()
    assert all((p.grad == 0).all() for p in model.segmentor.decoder.parameters())
    assert model.llm.model.get_input_embeddings().weight.grad.any()


# ---- what is asked -------------------------------------------------------------------------------


@pytest.fixture
def say(model, monkeypatch):
    """Makes `model` answer with the given tokens, whatever it is asked, and keep all queries."""

    def apply(*words: str) -> XSAM:
        encode = functools.partial(model.tokenizer.encode, add_special_tokens=False)
        ids = [token for word in words for token in encode(word)]

        def generate(embeddings, mask, max_new_tokens, on_ids=None):
            new = torch.tensor([ids] * len(embeddings))
            spoken = model.llm.model.get_input_embeddings()(new)
            whole = torch.cat([embeddings, spoken], dim=1)
            states = model.llm(whole, torch.cat([mask, torch.ones_like(new)], dim=1))
            for length in range(1, len(ids) + 1) if on_ids else ():
                on_ids(new[:, :length])
            return new, states[:, : -len(ids)], states[:, -len(ids) :]

        monkeypatch.setattr(model.llm, "generate", generate)
        monkeypatch.setattr(model, "config", model.config.resolve(score_threshold=0.0))
        return model

    return apply


@pytest.mark.parametrize("task", ASKED)
def test_an_answer_without_seg_has_no_masks(say, world, task):
    model = say("red", "ring")
    for prediction in respond(model, questions(world, task)):
        assert prediction.masks.shape == (0, *prediction.image.size[::-1])
        assert prediction.labels == prediction.scores == prediction.categories == []
        assert prediction.answer == "red ring"


@pytest.mark.parametrize("task", ASKED)
@pytest.mark.parametrize(
    "words",
    [("<SEG>", "<SEG>"), ("<p>", "ring", "</p>", "<SEG>", "<SEG>"), ("</p>", "<p>", "<SEG>")],
    ids=" ".join,
)
def test_an_answers_own_spans_change_nothing(say, processor, world, task, words):
    """Only the phrases that were asked for are classes, and only the first <SEG> is read."""
    samples, model = questions(world, task, 2), say(*words)
    encoded = [processor.encode(sample) for sample in samples]
    _, outputs = model.infer(processor.collate(encoded, pad_left=True), 4)
    assert outputs.image_index.tolist() == [0, 1]
    assert outputs.class_logits.shape[-1] == len(samples[0].names) + 1
    assert torch.isfinite(outputs.class_logits).all()
    for sample, prediction in zip(samples, respond(model, samples), strict=True):
        assert set(prediction.labels) <= set(sample.names)


def picture(height: int = 60, width: int = 100) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "draw"}, "unknown task 'draw'"),
        ({"task": "refer"}, "refer needs a text"),
        ({"task": "chat"}, "chat needs a text"),
        ({"task": "refer", "text": ["a", "b"]}, "1 images but 2 texts"),
        ({"task": "vgd"}, "vgd needs regions"),
        (
            {"task": "interactive", "regions": [np.ones((2, 3), bool)]},
            r"is 60x100 .*, not 2x3 as",
        ),
        ({"task": "gcg", "threshold": 0.5}, "gcg has no threshold"),
        ({"task": "vgd", "regions": [(3, 4)], "threshold": 2}, "from 0 to 1, not 2"),
        ({"task": "vgd", "regions": [(300, 4)]}, "region 1: the point at .* outside the 100x60"),
        ({"task": "refer", "text": "a", "beams": 2}, "beams is none of score_threshold"),
    ],
)
def test_wrong_requests_are_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.predict(picture(), **arguments)


def test_regions_are_numbers_or_masks(speaking_model):
    """A point is the disc that it was trained as; of interactive all regions mark one object."""
    image = picture()
    disc = draw_region(("point", [(50, 30)]), (60, 100))
    for task in ("interactive", "vgd"):
        points, masks = (
            speaking_model.predict(image, task, regions=[each]) for each in ((50, 30), disc)
        )
        assert len(points.masks) and same_answers(points, masks)
    both = draw_region(("box", [(5, 5), (20, 20)]), (60, 100))
    marks = speaking_model.predict(image, "interactive", regions=[(50, 30), (5, 5, 20, 20)])
    assert same_answers(marks, speaking_model.predict(image, "interactive", regions=[disc | both]))
    found = speaking_model.predict(image, "vgd", regions=[(50, 30), (5, 5, 20, 20)])
    assert found.names == ["region 1", "region 2"] and {*found.labels} <= {*found.names}


def same_answers(one: SegmentationResult, other: SegmentationResult) -> bool:
    is_close = np.allclose(one.scores, other.scores, atol=1e-5)
    return is_close and one.labels == other.labels and np.array_equal(one.masks, other.masks)


REQUESTS_OF_ONE_IMAGE = (
    dict(task="panoptic"),
    dict(task="refer", text="the ring"),
    dict(task="gcg"),
    dict(task="vgd", regions=[(20, 20)]),
    dict(task="vgd", regions=[(20, 20)], region_image=picture(50, 70)),
    dict(task="chat", text="what is it?"),
)


def test_an_image_is_encoded_once_for_several_requests(speaking_model, segmentor):
    for model, asked in (
        (speaking_model, REQUESTS_OF_ONE_IMAGE),
        (segmentor, [dict(task="panoptic"), dict(task="instance")]),
    ):
        encoded, calls = model.encode_image(picture()) if model.stage == 3 else None, []
        encoded = encoded or encode_image(model, picture())
        encoder = model.encoder if model.stage == 1 else model.segmentor.encoder
        hook = encoder.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        found = [predict(model, encoded, **request) for request in asked]
        assert len(calls) == sum("region_image" in request for request in asked)
        hook.remove()
        for prediction, request in zip(found, asked, strict=True):
            expected = predict(model, picture(), **request)
            assert same_answers(prediction, expected) and prediction.answer == expected.answer


def test_an_answer_is_told_as_it_grows(say):
    model, heard = say("red", "ring", "<SEG>"), []
    prediction = model.predict(picture(), "refer", "the ring", on_text=heard.append)
    assert heard == ["red", "red ring", "red ring"] and prediction.text == "red ring"

    def stop(text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.predict(picture(), "refer", "the ring", on_text=stop)


def test_the_language_model_tells_what_it_says(speaking_model):
    heard = []
    found = speaking_model.predict(
        picture(), "chat", "what?", on_text=heard.append, max_new_tokens=4
    )
    assert 1 <= len(heard) <= 4 and heard[-1] == found.text


def test_thresholds_are_of_one_request(speaking_model):
    before = speaking_model.config
    counts = [
        len(speaking_model.predict(picture(), "refer", "a ring", threshold=least).masks)
        for least in (0.0, 1.0)
    ]
    assert counts == [1, 0]
    found = speaking_model.predict(picture(), "panoptic", threshold=1.0)
    assert not len(found.masks)
    every = speaking_model.predict(picture(), "instance")
    some = speaking_model.predict(picture(), "instance", threshold=every.scores[2])
    assert same_answers(every, some) and every.threshold == 0.3 and some.shown() == [0, 1, 2]
    long = speaking_model.predict(picture(), "chat", "what?", max_new_tokens=0)
    assert long.answer == "" and speaking_model.config == before


def test_a_picture_may_be_a_path(speaking_model, tmp_path):
    picture().save(tmp_path / "drawing.png")
    expected = speaking_model.predict(picture(), "refer", "the ring")
    for path in (tmp_path / "drawing.png", str(tmp_path / "drawing.png")):
        for image in (path, speaking_model.encode_image(path)):
            assert same_answers(speaking_model.predict(image, "refer", "the ring"), expected)
    with pytest.raises(ValueError, match=r"absent\.png"):
        speaking_model.predict("absent.png", "refer", "the ring")


@pytest.mark.parametrize("bits", [8, 4])
def test_the_language_model_in_fewer_bits_answers_nearly_as_before(speaking_model, bits):
    pytest.importorskip("bitsandbytes")
    model = copy.deepcopy(speaking_model)
    layers = model.llm.model.get_decoder().layers
    before = layers[0].mlp.down_proj.weight.nbytes
    quantize(model, bits)
    assert layers[0].mlp.down_proj.weight.nbytes * 32 == before * bits
    is_narrow = type(layers[0].self_attn.qkv_proj) is torch.nn.Linear  # 96: no blocks of 64
    assert is_narrow == (bits == 4)
    expected = speaking_model.predict(picture(), "refer", "the ring")
    found = model.predict(picture(), "refer", "the ring")
    assert found.answer == expected.answer and np.mean(found.masks == expected.masks) > 0.9


def test_the_segmentor_segments_its_own_categories_only(segmentor):
    for arguments in (
        {"task": "chat", "text": "Hello"},
        {"task": "refer", "text": "ring"},
        {"task": "panoptic", "things": ["elephant"]},
    ):
        with pytest.raises(ValueError, match="stage-1 checkpoint"):
            predict(segmentor, picture(), **arguments)
    own = [each["name"] for each in segmentor.config.categories]
    for task in ("panoptic", "instance", "semantic"):
        assert set(predict(segmentor, picture(), task).labels) <= set(own)
    assert set(predict(segmentor, picture(), "semantic", stuff=own[3:1:-1]).labels) <= set(own[2:4])


def test_a_model_without_categories_says_so(model, monkeypatch):
    monkeypatch.setattr(model, "config", model.config.resolve(categories=()))
    with pytest.raises(ValueError, match=r"things|stuff|categor"):
        model.predict(picture(), "panoptic")


def test_a_placeholder_in_a_users_text_does_not_break_the_model(model):
    """It is refused, or read as words."""
    try:
        prediction = model.predict(picture(), "chat", "What is <image> of?")
    except ValueError:
        return
    assert len(prediction.masks) == 0


def test_a_request_at_any_size_and_of_many_images(speaking_model):
    model = speaking_model
    images = [picture(60, 100), picture(37, 20).convert("L"), picture(200, 90).convert("RGBA")]
    found = model.predict(images, "refer", ["the ring", "the red star", "the star"])
    assert [prediction.labels for prediction in found] == [
        ["the ring"],
        ["the red star"],
        ["the star"],
    ]
    for image, prediction in zip(images, found, strict=True):
        assert prediction.masks.shape == (1, image.height, image.width)
    alone = model.predict(images[0], "refer", "the ring")
    assert (alone.masks == found[0].masks).mean() > 0.999

    prediction = model.predict(images[0], "panoptic", things=["ring", "star"], stuff=["dots"])
    assert prediction.labels and set(prediction.labels) <= {"ring", "star", "dots"}
    assert prediction.labels == [["ring", "star", "dots"][i] for i in prediction.categories]
    as_text = model.predict(images[0], "panoptic", things="ring,star", stuff="dots")
    assert as_text.labels == prediction.labels  # not the letters of the text
    with pytest.raises(ValueError, match=r"absent\.txt: cannot be read as a list of names"):
        model.predict(images[0], "panoptic", things="absent.txt")
    assert model.predict(images[0], "chat", "Hello").masks.shape == (0, 60, 100)


@pytest.mark.parametrize("task", requests())
def test_every_request_is_answered_at_the_images_size(speaking_model, task):
    region, reference_image = np.zeros((60, 100), bool), picture(80, 50)
    region[10:30, 20:50] = True
    arguments = {"text": "the red ring"} if task in ("chat", "refer", "reason") else {}
    if task in ("interactive", "vgd"):
        arguments = {"regions": [region]}
    prediction = speaking_model.predict(picture(), task, **arguments)
    assert prediction.masks.shape[1:] == (60, 100) and prediction.num_prompts == 1
    assert len(prediction.masks) == len(prediction.labels) == len(prediction.scores)
    if task == "semantic":  # every pixel has a class
        assert (prediction.masks.sum(axis=0) == 1).all()
    if task == "vgd":
        others = [np.ones((80, 50), bool)] * 2
        shown = speaking_model.predict(
            picture(), task, regions=others, region_image=reference_image
        )
        assert set(shown.labels) == {"region 1", "region 2"}
        assert shown.masks.shape[1:] == (60, 100)


def test_an_image_and_regions_from_python_are_of_any_kind(speaking_model):
    """An array, a photo with a tag, 16 bits: all are the upright picture of 8 bits."""
    shown, inside = picture(), np.zeros((60, 100), bool)
    inside[10:30, 20:50] = True
    stored = shown.transpose(Image.Transpose.ROTATE_90)
    stored.getexif()[274] = 6
    stored.info["exif"] = stored.getexif().tobytes()
    expected = speaking_model.predict(shown, "vgd", regions=[inside, inside])
    drawn = Image.fromarray(inside.astype(np.uint8) * 200).convert("RGBA")
    drawn.putalpha(Image.fromarray(inside.astype(np.uint8) * 255))
    for image in (np.asarray(shown), np.asarray(shown, np.uint16) * 257, stored):
        for region in (inside.astype(np.uint8), inside.astype(np.float32), drawn):
            regions = np.stack([inside, inside]) if region is drawn else [region, inside]
            found = speaking_model.predict(image, "vgd", regions=regions)
            assert found.image.tobytes() == shown.tobytes()
            assert (found.masks == expected.masks).all() and found.scores == expected.scores
    turned = np.rot90(inside).copy()  # a region of the stored pixels
    assert speaking_model.predict(stored, "vgd", regions=[turned]).masks.shape[1:] == (100, 60)
    for wrong in (np.zeros((3, 60, 100)), np.zeros((0, 4)), None):
        with pytest.raises(ValueError, match=r"image: is .*give a PIL image or an array"):
            speaking_model.predict(wrong, "vgd", regions=[inside])
    with pytest.raises(ValueError, match=r"region 2: has \[1, 2\] beside black"):
        labels = inside + 2 * np.roll(inside, 40, axis=1)
        speaking_model.predict(shown, "vgd", regions=[inside, labels])


def test_names_beyond_one_prompt_are_asked_in_several(speaking_model, monkeypatch):
    names = [f"{color} {shape}" for color in ("red", "green", "blue") for shape in ("ring", "star")]
    config = speaking_model.config
    monkeypatch.setattr(speaking_model, "config", config.resolve(max_text_length=320))
    whole = speaking_model.predict(picture(), "semantic", stuff=names)
    monkeypatch.setattr(speaking_model, "config", config.resolve(max_text_length=45))
    split = speaking_model.predict(picture(), "semantic", stuff=names)
    assert whole.num_prompts == 1 and split.num_prompts > 1
    for prediction in (whole, split):
        assert (prediction.masks.sum(axis=0) == 1).all()
        assert prediction.labels == [names[place] for place in prediction.categories]
    with pytest.raises(ValueError, match="max_text_length"):  # a text alone cannot be split
        speaking_model.predict(picture(), "refer", " ".join(["ring"] * 60))


def test_a_prediction_as_json_is_the_prediction():
    masks = np.zeros((2, 30, 50), bool)
    masks[0, 4:9, 10:30] = masks[1, 20:, :7] = True
    prediction = SegmentationResult(
        picture(30, 50), masks, [0, 1], ["ring", "star"], [0.91, 0.5], "<SEG>"
    )
    document = prediction.to_dict()
    assert document["answer"] == "<SEG>"
    for mask, segment, label in zip(masks, document["segments"], ["ring", "star"], strict=True):
        rle = segment["segmentation"]
        assert (coco_mask.decode(rle).astype(bool) == mask).all()
        assert segment["label"] == label and segment["area"] == mask.sum()
    assert document["segments"][0]["bbox"] == [10, 4, 20, 5]
    assert prediction.draw("rings").width >= 50


# ---- visual prompts ------------------------------------------------------------------------------


@torch.no_grad()
def test_a_region_token_is_the_mean_of_the_tokens_under_its_prompt(model, processor):
    """Two prompts of one image, in reading order, and a second image's own."""
    samples = []
    for boxes in (((0, 0, 40, 40), (60, 64, 128, 128)), ((30, 100, 90, 120),)):
        regions = np.zeros((len(boxes), 128, 128), bool)
        for region, (top, left, bottom, right) in zip(regions, boxes, strict=True):
            region[top:bottom, left:right] = True
        question = "Segment " + ", ".join(["<p><region></p>"] * len(boxes))
        picture = Image.fromarray(
            np.random.default_rng(len(boxes)).integers(0, 255, (128, 128, 3), dtype=np.uint8)
        )
        masks, labels = np.zeros((0, 128, 128), bool), np.zeros(0, np.int64)
        turns = [(question, "Sure, <SEG>.")]
        names = [f"kind {number}" for number in range(len(boxes))]
        samples.append(Sample("x", "vgd", picture, turns, masks, labels, None, names, regions))
    batch = training_batch(processor, samples)
    assert batch.region_index.tolist() == [0, 0, 1]

    embeddings, hidden_states = model.encode(batch)
    vectors = embeddings[batch.input_ids == REGION_TOKEN]
    grid = model.seg_projector(pixel_shuffle(hidden_states[-2], 0.5))
    side = grid.shape[1] - 1
    for vector, points, image in zip(vectors, batch.region_points, batch.region_index, strict=True):
        y, x = (points * side).T
        expected = torch.zeros_like(vector)
        for a, b in zip(y, x, strict=True):  # bilinear, corner tokens at 0 and 1
            i, j = min(int(a), side - 1), min(int(b), side - 1)
            cell = grid[image, i : i + 2, j : j + 2]
            rows = torch.tensor([1 - (a - i), a - i])
            columns = torch.tensor([1 - (b - j), b - j])
            expected += torch.einsum("y,x,yxc->c", rows, columns, cell) / len(points)
        assert torch.allclose(vector, expected, atol=1e-5)
    # The conditions exist as for names: one class a region, and the background.
    assert model(batch).predictions.class_logits.shape[-1] == 3


# ---- compiled blocks -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "backend",
    ["eager", pytest.param("inductor", marks=pytest.mark.slow)],  # which compiles for minutes
)
def test_compiled_blocks_give_the_same_gradients(world, model, processor, backend):
    """Captured by torch.compile, and run again in the backward pass."""
    samples, gradients = training_samples(world, "refer", 2), []
    for is_compiled in (False, True):
        copied = copy.deepcopy(model).train()
        if is_compiled:
            compile_blocks(copied, backend)
            checkpoint_activations(copied)
            before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        batch = training_batch(processor, samples)
        losses = Objective(copied, copied.config)(batch, Normalisers(1.0, 1.0, 1.0))
        sum(losses.values()).backward()
        gradients.append([each.grad for each in copied.parameters() if each.grad is not None])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before >= 5  # kinds of blocks
    assert len(gradients[0]) > 100
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, eager, atol=1e-3 * float(eager.abs().max()), rtol=1e-3)


# ---- what is computed in which type --------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_autocast_is_for_bfloat16_alone(world, config, processor, dtype):
    """In training and in answering, whatever the device: float32 is float32 throughout."""
    categories = open_dataset("coco_panoptic", world / "data").categories
    config = config.resolve(dtype=dtype, categories=categories)
    model, seen = pretrained_model(1, config, world / "weights", lambda _: None), set()
    hook = lambda *_: seen.add(torch.is_autocast_enabled("cpu"))  # noqa: E731
    model.encoder.register_forward_hook(hook)
    dataset = open_dataset("coco_panoptic", world / "data", all_classes=True)
    reader = Processor(config, None)
    batch = reader.collate([reader.encode(dataset.sample(0, np.random.default_rng(0)))])
    Objective(model, config)(batch, Normalisers(1.0, 1.0, 1.0))
    predict_inputs(model, build_inputs(reader, [dataset.inputs(0)]), "semantic")
    assert seen == {dtype == "bfloat16"}


# ---- activation checkpointing --------------------------------------------------------------------


@pytest.mark.parametrize("task", ["chat", "generic", "refer"])
def test_blocks_that_run_again_give_the_same_gradients(world, model, processor, task):
    """And keep less: what autograd saves is counted while the forward pass runs."""
    dataset = open_dataset(DATASETS[task], world / "data")
    samples = [dataset.sample(index, np.random.default_rng(index)) for index in range(2)]
    gradients, saved_bytes = [], []
    for is_recomputed in (False, True):
        copied = copy.deepcopy(model).train()
        if is_recomputed:
            checkpoint_activations(copied)
        saved: dict[int, int] = {}

        def keep(tensor, saved=saved):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        objective = Objective(copied, copied.config)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            batch = training_batch(processor, samples)
            losses = objective(batch, Normalisers(1.0, 1.0, 1.0))
        sum(losses.values()).backward()
        gradients.append({name: each.grad for name, each in copied.named_parameters()})
        saved_bytes.append(sum(saved.values()))
    assert sum(value is not None for value in gradients[0].values()) > 100
    for name, value in gradients[0].items():
        other = gradients[1][name]
        assert (value is None) == (other is None) and (value is None or torch.equal(value, other))
    assert saved_bytes[1] < saved_bytes[0]
