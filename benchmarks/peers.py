"""Our parts beside transformers' at full size: numerical differences, time and memory.

    python benchmarks/peers.py parity --out runs/peers
    python benchmarks/peers.py times --out runs/peers --device cpu --small

A part and its peer have the same random weights. `parity` measures the difference in float32, and
of both in bfloat16 the difference from the peer in float32; the criterion is compared with itself
on the CPU, with the same points. `times` measures milliseconds and peak memory, forward and forward
with backward, in bfloat16 as in training but without recomputation. `compiled` does the same with
the blocks of both sides compiled.

The border between decoder and losses is not the same on both sides: our decoder returns mask
embeddings, and the criterion makes masks of the matched queries; theirs makes all masks of all
layers. The row "decoders and losses" compares like with like.
"""

import argparse
import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import postprocess
import torch
from measure import Report, relative_error, time_in_turns
from torch import Tensor, nn
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerLoss,
    Mask2FormerPixelDecoder,
    Mask2FormerTransformerModule,
)
from transformers.models.sam.modeling_sam import SamVisionEncoder

from xsam.cli import add_device_flag
from xsam.config import Config, xsam
from xsam.data import ResizeAndPad
from xsam.decoder import DecoderOutput
from xsam.distributed import choose_device
from xsam.losses import Normalisers, Targets, segmentation_losses
from xsam.model import Segmentor, compile_blocks
from xsam.toy.preset import toy
from xsam.toy.weights import sam_config
from xsam.train import cast_parameters

NUM_IMAGES, NUM_TARGETS = 2, 20  # images of the decoders, targets of each for the losses
Output = dict[str, Tensor]  # mask and class logits under transformers' names
_LEAVES = "class_logits", "mask_embeddings", "mask_features"  # of our DecoderOutput
ROWS = "SAM encoder", "decoders", "losses", "decoders and losses"


def small() -> Config:
    """The toy with smaller images, and the width that transformers' decoders require."""
    sizes = dict(decoder_dim=256, decoder_heads=8, pixel_decoder_points=4, num_classes=133)
    return toy().resolve(seg_image_size=64, **sizes)


# ---- ours and theirs -----------------------------------------------------------------------------


class OurEncoder(nn.Module):
    def __init__(self, segmentor: Segmentor):
        super().__init__()
        self.encoder = segmentor.encoder

    def forward(self, pixels: Tensor) -> Tensor:
        return self.encoder.neck(self.encoder(pixels)[-1])


class TheirEncoder(nn.Module):
    def __init__(self, segmentor: Segmentor):
        super().__init__()
        self.encoder = SamVisionEncoder(sam_config(segmentor.config.model))
        self.encoder.load_state_dict(segmentor.encoder.state_dict())

    def forward(self, pixels: Tensor) -> Tensor:
        return self.encoder(pixels).last_hidden_state


class OurDecoders(nn.Module):
    """Feature maps, finest first, to what the criterion reads."""

    def __init__(self, segmentor: Segmentor):
        super().__init__()
        self.pixel_decoder, self.decoder = segmentor.pixel_decoder, segmentor.decoder
        self.class_head = segmentor.class_head

    def forward(self, *features: Tensor) -> DecoderOutput:
        mask_features, levels = self.pixel_decoder(list(features))
        queries, mask_embeddings = self.decoder(mask_features, levels)
        index = torch.arange(len(mask_features), device=mask_features.device)
        return DecoderOutput(self.class_head(queries), mask_embeddings, mask_features, index)


class TheirDecoders(nn.Module):
    """The same, joined as in transformers' Mask2Former: the outputs, the last one last."""

    def __init__(self, segmentor: Segmentor):
        super().__init__()
        config = mask2former_config(segmentor.config)
        self.pixel_decoder = Mask2FormerPixelDecoder(config, segmentor.connector.dims)
        self.pixel_decoder.load_state_dict(segmentor.pixel_decoder.state_dict())
        self.decoder = Mask2FormerTransformerModule(config.feature_size, config)
        self.decoder.load_state_dict(segmentor.decoder.state_dict())
        self.class_head = copy.deepcopy(segmentor.class_head)

    def forward(self, *features: Tensor) -> list[Output]:
        options = dict(output_hidden_states=True, output_attentions=False)
        pixels = self.pixel_decoder(list(features), **options)
        found = self.decoder(pixels.multi_scale_features, pixels.mask_features, **options)
        queries = torch.stack([each.transpose(0, 1) for each in found.intermediate_hidden_states])
        outputs = zip(found.masks_queries_logits, self.class_head(queries), strict=True)
        return [{"masks_queries_logits": m, "class_queries_logits": c} for m, c in outputs]


def mask2former_config(settings: Config) -> Mask2FormerConfig:
    model, loss = settings.model, settings.loss
    return Mask2FormerConfig(
        feature_strides=[8, 16, 32],
        feature_size=model.decoder_dim,
        mask_feature_size=model.decoder_dim,
        hidden_dim=model.decoder_dim,
        num_attention_heads=model.decoder_heads,
        encoder_layers=model.pixel_decoder_layers,
        encoder_feedforward_dim=model.pixel_decoder_mlp_dim,
        decoder_layers=model.decoder_layers + 1,  # theirs counts the output before the first layer
        dim_feedforward=model.decoder_mlp_dim,
        num_queries=model.num_queries,
        num_labels=model.num_classes,
        no_object_weight=loss.background_weight,
        class_weight=loss.class_weight,
        mask_weight=loss.mask_weight,
        dice_weight=loss.dice_weight,
        train_num_points=loss.num_points,
        oversample_ratio=loss.oversample_ratio,
        importance_sample_ratio=loss.importance_ratio,
    )


class Bench:
    """The modules of both sides, in float32 at first, and their inputs."""

    def __init__(self, config: Config, device: torch.device):
        torch.manual_seed(0)
        self.config, self.device, segmentor = config, device, Segmentor(config)
        with torch.no_grad():  # parameters that start at or near zero would hide a mistake
            for name, parameter in segmentor.named_parameters():
                if name.startswith("encoder.") and "norm" not in name:
                    parameter.normal_(std=0.2 if "pos" in name else 0.03)
                elif "decoder." in name:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        self.encoder = OurEncoder(segmentor), TheirEncoder(segmentor)
        self.decoders = OurDecoders(segmentor), TheirDecoders(segmentor)
        for module in (*self.encoder, *self.decoders):
            module.to(device)
        size, grid = config.model.seg_image_size, segmentor.encoder.pos_embed.shape[1]
        self.pixels = torch.randn(1, 3, size, size, device=device)
        self.features = [
            torch.randn(NUM_IMAGES, dim, side, side, device=device)
            for dim, side in zip(segmentor.connector.dims, (2 * grid, grid, grid // 2), strict=True)
        ]
        blocks = torch.randn(NUM_IMAGES, NUM_TARGETS, 8, 8, device=device) > 0.5
        masks = blocks.repeat_interleave(size // 8, 2).repeat_interleave(size // 8, 3)
        labels = torch.randint(config.model.num_classes, masks.shape[:2], device=device)
        self.targets = [Targets(*each) for each in zip(masks, labels, strict=True)]
        self.criterion = Mask2FormerLoss(mask2former_config(config), weight_dict={}).to(device)

    def cast(self) -> None:
        """Casts the modules of both sides to bfloat16."""
        for module in (*self.encoder, *self.decoders):
            cast_parameters(module, torch.bfloat16)

    def our_loss(self, predictions: DecoderOutput, place: str | None = None) -> Tensor:
        """`place`: the device on which the points are drawn (default: the modules')."""
        generators = [torch.Generator(place or self.device) for _ in range(NUM_IMAGES)]
        generators = [each.manual_seed(run) for run, each in enumerate(generators)]
        normalisers = Normalisers(NUM_IMAGES * NUM_TARGETS, 100.0, 1.0)
        return sum(
            segmentation_losses(
                predictions, self.targets, generators, normalisers, self.config.loss
            ).values()
        )

    def their_loss(self, outputs: list[Output]) -> Tensor:
        # Ours casts to float32 itself; theirs raises where logits and targets differ in type.
        outputs = [{name: x.float() for name, x in each.items()} for each in outputs]
        losses = self.criterion(
            **outputs[-1],
            mask_labels=[target.masks.float() for target in self.targets],
            class_labels=[target.labels for target in self.targets],
            auxiliary_predictions=outputs[:-1],
        )
        return sum(losses.values())


# ---- parity --------------------------------------------------------------------------------------


def parity(report: Report, bench: Bench) -> None:
    device = bench.device
    parts = {
        "SAM encoder": (bench.encoder, [bench.pixels], lambda x: x, lambda x: x),
        "decoders": (
            bench.decoders,
            bench.features,
            lambda predictions: predictions.mask_logits(),
            lambda outputs: outputs[-1]["masks_queries_logits"],
        ),
    }
    expected = {}
    for dtype in ("float32", "bfloat16"):
        is_mixed = dtype == "bfloat16"
        if is_mixed:
            bench.cast()
        for name, (modules, inputs, *reads) in parts.items():
            with report.guard(f"{name}, {dtype}"), torch.no_grad():
                with torch.autocast(device.type, torch.bfloat16, enabled=is_mixed):
                    outputs = [module(*inputs) for module in modules]
                    ours, theirs = (
                        read(output) for read, output in zip(reads, outputs, strict=True)
                    )
                if not is_mixed:
                    expected[name] = theirs
                    error = relative_error(ours, theirs)
                    # Rounding may flip a mask logit near zero, and with it an attention mask.
                    report.add(f"{name}, {dtype}", error < 1e-3, relative_error=error)
                    continue
                errors = [relative_error(each, expected[name]) for each in (ours, theirs)]
                passed = errors[0] < 1.5 * errors[1] + 1e-3
                report.add(f"{name}, {dtype}", passed, ours=errors[0], theirs=errors[1])
    with report.guard("criterion, beside the CPU"):
        _compare_criterion(report, bench)


def _compare_criterion(report: Report, bench: Bench) -> None:
    """Losses and gradients on the device and on the CPU, from the same predictions and points."""
    with torch.no_grad(), torch.autocast(bench.device.type, torch.bfloat16):
        predictions = bench.decoders[0](*bench.features)
    found = []
    for device in (bench.device, torch.device("cpu")):
        moved = {
            name: x.to(device) for name, x in vars(predictions).items() if isinstance(x, Tensor)
        }
        leaves = [x.float().requires_grad_() for x in moved.values() if x.is_floating_point()]
        bench.targets = [Targets(t.masks.to(device), t.labels.to(device)) for t in bench.targets]
        loss = bench.our_loss(DecoderOutput(*leaves, moved["image_index"]), place="cpu")
        found.append([loss, *torch.autograd.grad(loss, leaves)])
    errors = [relative_error(*pair) for pair in zip(*found, strict=True)]
    names = "loss", "gradient_classes", "gradient_embeddings", "gradient_features"
    figures = dict(zip(names, errors, strict=True))
    report.add("criterion, beside the CPU", errors[0] < 1e-4 and max(errors) < 2e-2, **figures)


# ---- time and memory -----------------------------------------------------------------------------


Calls = dict[str, Callable[[], Tensor]]  # "ours" and "theirs", each giving a loss


def build_rows(bench: Bench) -> dict[str, Calls]:
    """The calls of each row of ROWS."""

    def mixed(function: Callable, *inputs: Tensor):
        with torch.autocast(bench.device.type, torch.bfloat16):
            return function(*inputs)

    def mean(outputs: Tensor | DecoderOutput | list[Output]) -> Tensor:
        if isinstance(outputs, DecoderOutput):
            outputs = [{name: getattr(outputs, name) for name in _LEAVES}]
        elif isinstance(outputs, Tensor):
            outputs = [{"": outputs}]
        return sum(x.float().mean() for each in outputs for x in each.values())

    sides = "ours", "theirs"
    rows: dict[str, Calls] = {name: {} for name in ROWS}
    for side, encoder, decoders, loss in zip(
        sides, bench.encoder, bench.decoders, (bench.our_loss, bench.their_loss), strict=True
    ):
        with torch.no_grad():
            found = mixed(decoders, *bench.features)
        if isinstance(found, DecoderOutput):
            leaves = {name: getattr(found, name).requires_grad_() for name in _LEAVES}
            found = dataclasses.replace(found, **leaves)
        else:
            found = [{name: x.requires_grad_() for name, x in each.items()} for each in found]
        calls = (
            lambda encoder=encoder: mean(mixed(encoder, bench.pixels)),
            lambda decoders=decoders: mean(mixed(decoders, *bench.features)),
            lambda loss=loss, found=found: loss(found),
            lambda loss=loss, decoders=decoders: loss(mixed(decoders, *bench.features)),
        )
        for name, call in zip(ROWS, calls, strict=True):
            rows[name][side] = call
    return rows


def times(report: Report, bench: Bench, rounds: int, backend: str | None) -> None:
    """`backend` of torch.compile for the blocks of both sides; None: eager."""
    bench.cast()
    modules = (*bench.encoder, *bench.decoders)
    rows, suffix = build_rows(bench), ""
    if backend:  # compiling takes a minute or more a row
        rows, suffix = {name: rows[name] for name in (ROWS[0], ROWS[3])}, ", compiled"
        for module in modules:
            compile_blocks(module, backend)

    def backward(call: Callable[[], Tensor]) -> None:
        for module in modules:
            module.zero_grad(set_to_none=True)
        call().backward()

    for name, calls in rows.items():
        with torch.no_grad():
            _time_row(report, f"{name}, forward{suffix}", calls, bench.device, rounds)
        calls = {side: lambda call=call: backward(call) for side, call in calls.items()}
        _time_row(report, f"{name}, forward and backward{suffix}", calls, bench.device, rounds)
    transform = ResizeAndPad.fit(postprocess.SIZE, postprocess.CANVAS)
    logits = (each.to(bench.device) for each in postprocess.model_outputs(0, transform))
    pairs = {} if backend else postprocess.build_pairs(*logits, transform)
    for name, pair in pairs.items():
        calls = dict(zip(("ours", "theirs"), pair, strict=True))
        with torch.no_grad():
            _time_row(report, f"post-processing, {name}", calls, bench.device, rounds)


def _time_row(
    report: Report, name: str, calls: dict[str, Callable], device: torch.device, rounds: int
) -> None:
    """A record of both sides, or of ours alone where the peer raises."""
    with report.guard(name):
        figures: dict[str, object] = {}
        try:
            calls["theirs"]()
        except Exception as error:
            figures["peer"] = f"failed: {type(error).__name__}: {error}"[:200]
            del calls["theirs"]
        timings = time_in_turns(calls, device, rounds)
        for side, timing in timings.items():
            figures |= {f"{side}_ms": timing.seconds * 1e3}
            figures |= {f"{side}_peak_gb": timing.peak / 1e9} if timing.peak is not None else {}
        if len(timings) == 2:
            figures["times_faster"] = timings["theirs"].seconds / timings["ours"].seconds
            if timings["theirs"].peak:
                figures["of_peer_memory"] = timings["ours"].peak / timings["theirs"].peak
        report.add(name, **figures)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("parity", "times", "compiled"))
    parser.add_argument("--out", type=Path, required=True, help="folder for WHAT.jsonl")
    parser.add_argument("--small", action="store_true", help="the toy's sizes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    add_device_flag(parser)
    options = parser.parse_args()
    report = Report(options.out / f"{options.what}.jsonl")
    backend = options.backend if options.what == "compiled" else None
    bench = Bench(small() if options.small else xsam(), choose_device(options.device))
    if options.what == "parity":
        parity(report, bench)
    else:
        times(report, bench, options.rounds, backend)
    return int(report.num_failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
